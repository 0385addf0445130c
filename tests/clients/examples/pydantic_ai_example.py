"""pydantic-ai: agents over chat, responses and messages."""

from checks import KEY, MODEL, URL, run
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

OPENAI = OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY)
MODELS = [
    OpenAIChatModel(MODEL, provider=OPENAI),
    OpenAIResponsesModel(MODEL, provider=OPENAI),
    AnthropicModel(MODEL, provider=AnthropicProvider(base_url=URL, api_key=KEY)),
]
SHORT = {"max_tokens": 100, "temperature": 0}


class Bird(BaseModel):
    name: str = Field(max_length=20)
    legs: int = Field(ge=0, le=9)


def text() -> None:
    for model in MODELS:
        assert Agent(model, model_settings=SHORT).run_sync("Name a bird.").output


async def streaming() -> None:
    for model in MODELS:
        async with Agent(model, model_settings=SHORT).run_stream("Name a bird.") as result:
            assert await result.get_output()


def history() -> None:
    for model in MODELS:
        agent = Agent(model, model_settings=SHORT)
        first = agent.run_sync("Name a bird.")
        assert agent.run_sync("Another.", message_history=first.all_messages()).output


def tools() -> None:
    for model in MODELS:
        agent = Agent(model, model_settings=SHORT, output_type=Bird, retries=0)  # a tool that must be called
        assert isinstance(agent.run_sync("Name a bird.").output, Bird)


def structured_output() -> None:
    for model in MODELS[:2]:
        agent = Agent(model, model_settings=SHORT, output_type=NativeOutput(Bird), retries=0)
        assert isinstance(agent.run_sync("Name a bird.").output, Bird)


run({
    "text": text, "streaming": streaming, "history": history, "tools": tools, "structured output": structured_output,
})  # fmt: skip
