"""How JSON that others wrote becomes data: what all answers share, what a server may write instead, and a model's text.

Invariant: nothing is read as what it is not; null, and text in parts, stand for what they plainly mean.

    class Usage(Answer): prompt_tokens: OrNull[int] = 0
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticUseDefault

from trimtab.clients.errors import BadAnswer
from trimtab.errors import InvalidRequest

P = TypeVar("P")
Kind = type[P]  # in classes that have a field `type`


class Answer(BaseModel):
    """What all of them are. Unknown fields are kept, so that a newer server never breaks an older client."""

    model_config = ConfigDict(extra="allow", frozen=True)


def _or_default(value: Any) -> Any:
    if value is None:
        raise PydanticUseDefault
    return value


def _joined(content: Any) -> Any:
    """The text of a message's content, where a server tells it in parts."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


OrNull = Annotated[P, BeforeValidator(_or_default)]  # null stands for the field's default, as in some servers' answers
Content = Annotated[str | None, BeforeValidator(_joined)]


def parse(text: str, kind: type[P]) -> P:
    """JSON that a model wrote, as data: a pydantic class, or dict. Raises BadAnswer; InvalidRequest for a kind that
    nothing can be read as."""
    name = getattr(kind, "__name__", kind)  # a union has none
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise BadAnswer(f"the model's text is no {name}: {error}") from error
    except PydanticUserError as error:
        told = f"no JSON can be read as {name}: give a pydantic class, a dataclass or a plain type such as dict"
        raise InvalidRequest(f"{told} ({error.message.splitlines()[0]})", "kind") from error
