"""LiteLLM, steered: any OpenAI-compatible server is `openai/MODEL`, and extra_body is passed on.

TRIMTAB_BASE_URL=http://127.0.0.1:8000/v1 python litellm_chat.py
"""

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no price list is fetched at the import

import litellm
from openai import OpenAI

url = os.environ.get("TRIMTAB_BASE_URL", "http://127.0.0.1:8000/v1")
key = os.environ.get("TRIMTAB_API_KEY", "none")
models = OpenAI(base_url=url, api_key=key).models.list().data
base, correction = models[0].id, next(model.id for model in models if model.parent)

asked = {
    "model": f"openai/{base}",
    "api_base": url,
    "api_key": key,
    "messages": [{"role": "user", "content": "Write one short sentence about the sea."}],
    "max_tokens": 40,
    "extra_body": {"steering": {"correction": correction, "strength": 1.0}},
}
answer = litellm.completion(**asked)
print(answer.choices[0].message.content)

for chunk in litellm.completion(**asked, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
