"""OpenAI's own client, steered: `steering` travels in extra_body, and what it did comes back with each choice.

TRIMTAB_BASE_URL=http://127.0.0.1:8000/v1 python openai_python.py
"""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("TRIMTAB_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("TRIMTAB_API_KEY", "none"),  # the client insists on one
)
models = client.models.list().data
base = models[0].id  # a server lists its base first
correction = next(model.id for model in models if model.parent)

# A correction's name is a model's name: nothing else need change.
answer = client.chat.completions.create(
    model=correction, messages=[{"role": "user", "content": "Write one short sentence about the sea."}], max_tokens=40
)
print(answer.choices[0].message.content)

# Or say how it is to act. Whatever the client does not know lands in `model_extra`.
stream = client.chat.completions.create(
    model=base,
    messages=[{"role": "user", "content": "And one about the moon."}],
    max_tokens=40,
    stream=True,
    extra_body={"steering": {"correction": correction, "strength": 0.5, "report": "tokens"}},
)
receipts = []
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
        told = (choice.model_extra or {}).get("steering", {})
        receipts += told.get("tokens", [])
fired = sum(receipt["fired"] for receipt in receipts)
print(f"\n{len(receipts)} steps; {correction} acted at {fired} of them")
