"""langchain-openai: chat models and embeddings."""

from checks import KEY, MODEL, QUESTION, URL, is_weather, run
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

COMMON = {"model": MODEL, "base_url": f"{URL}/v1", "api_key": KEY, "max_retries": 0, "timeout": 300}
chat = ChatOpenAI(**COMMON, max_tokens=100)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "tells the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


class Bird(BaseModel):
    name: str = Field(max_length=20)
    legs: int = Field(ge=0, le=9)


def text() -> None:
    assert chat.invoke("Name a bird.").content
    assert ChatOpenAI(**COMMON, max_tokens=16, use_responses_api=True).invoke("Name a bird.").content


def streaming() -> None:
    assert "".join(chunk.content for chunk in chat.stream("Name a bird."))


def history() -> None:
    said = [HumanMessage("Name a bird."), AIMessage("A crow."), HumanMessage("Another.")]
    assert chat.invoke(said).content


def tools() -> None:
    bound = chat.bind_tools([TOOL], tool_choice="any")
    answer = bound.invoke(QUESTION)
    [call, *_] = answer.tool_calls
    assert is_weather(call["args"])
    result = ToolMessage("sunny", tool_call_id=call["id"])
    chat.bind_tools([TOOL]).invoke([HumanMessage(QUESTION), answer, result])


def structured_output() -> None:
    bird = chat.with_structured_output(Bird, method="json_schema").invoke("Name a bird.")
    assert isinstance(bird, Bird)


def embeddings() -> None:
    embedder = OpenAIEmbeddings(**COMMON, check_embedding_ctx_length=False)
    assert len(embedder.embed_documents(["a bird", "a plane"])) == 2


run({
    "text": text, "streaming": streaming, "history": history, "tools": tools, "structured output": structured_output,
    "embeddings": embeddings,
})  # fmt: skip
