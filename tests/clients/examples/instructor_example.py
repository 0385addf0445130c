"""instructor: structured output by tools and by JSON schemas."""

import instructor
from checks import KEY, MODEL, URL, run
from openai import OpenAI
from pydantic import BaseModel, Field

client = OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=300)


class Bird(BaseModel):
    name: str = Field(max_length=20)
    legs: int = Field(ge=0, le=9)


def ask(mode: instructor.Mode) -> None:
    bird = instructor.from_openai(client, mode=mode).chat.completions.create(
        model=MODEL, max_tokens=100, messages=[{"role": "user", "content": "Name a bird."}], response_model=Bird,
        max_retries=0,
    )  # fmt: skip
    assert isinstance(bird, Bird)


run({
    "tools": lambda: ask(instructor.Mode.TOOLS),
    "structured output": lambda: ask(instructor.Mode.JSON_SCHEMA),
})  # fmt: skip
