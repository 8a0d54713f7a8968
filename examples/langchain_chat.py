"""LangChain, steered: ChatOpenAI passes extra_body on, in calls, streams and chains alike.

TRIMTAB_BASE_URL=http://127.0.0.1:8000/v1 python langchain_chat.py
"""

import os

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai import OpenAI

url = os.environ.get("TRIMTAB_BASE_URL", "http://127.0.0.1:8000/v1")
key = os.environ.get("TRIMTAB_API_KEY", "none")
models = OpenAI(base_url=url, api_key=key).models.list().data
base, correction = models[0].id, next(model.id for model in models if model.parent)

model = ChatOpenAI(
    model=base,
    base_url=url,
    api_key=key,
    max_tokens=40,
    use_responses_api=False,
    extra_body={"steering": {"correction": correction, "strength": 1.0}},
)
print(model.invoke("Write one short sentence about the sea.").content)

# The same model in a chain, streamed.
prompt = ChatPromptTemplate.from_messages([("system", "You are brief."), ("human", "Write about {subject}.")])
for message in (prompt | model).stream({"subject": "the moon"}):
    print(message.content, end="", flush=True)
print()
