"""Instructor: an answer as a pydantic object. The server's grammar lets no other text through.

    TRIMTAB_BASE_URL=http://127.0.0.1:8000/v1 python instructor_extract.py

Nothing is steered inside the JSON, unless the request's steering asks for it.
"""

import os
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class Weather(BaseModel):
    sky: Literal["clear", "cloudy", "rain"]
    degrees: int = Field(ge=-40, le=50)
    windy: bool


plain = OpenAI(
    base_url=os.environ.get("TRIMTAB_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("TRIMTAB_API_KEY", "none"),
)
client = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)
weather = client.chat.completions.create(
    model=plain.models.list().data[0].id,
    messages=[{"role": "user", "content": "It rains in Ulm, at 11 degrees and without a breath of wind."}],
    response_model=Weather,
    max_tokens=100,
)
print(weather.model_dump_json())
