"""`dgemma.map`: prompts of any iterable to results, without files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..params import SamplingParams
from .detect import PROMPT_COLUMNS

if TYPE_CHECKING:
    from ..api import Model, Prompt


def map(  # what Python calls it
    prompts: Iterable[Prompt | Mapping[str, Any]],
    model: Model | str = "demo",
    params: SamplingParams | None = None,
    *,
    prompt_column: str | None = None,
    ordered: bool = True,
    errors: str = "raise",
    think: bool = False,
    raw: bool = False,
) -> Iterator[Any]:
    """Answers to prompts without end, as many at once as the model's engine takes.

    Prompts are taken only a little ahead of the answers, so memory stays flat however many there are.

    Args:
        prompts: texts, chat messages, token ids, pairs of one of these and `SamplingParams` of its own, or rows
            (mappings, as a `datasets.Dataset` gives them) with a prompt column.
        model: loaded, or a name for `dgemma.load`.
        params: for all prompts that bring none of their own.
        prompt_column: of rows; None for the first of prompt, question, text, messages that a row has.
        ordered: `Result`s in the order of the prompts; if False, (number, `Result`) as each is done.
        errors: "raise" ends it at the first prompt that fails; "return" gives the error in the result's place.

    Raises:
        RequestError: a row has no prompt; and the errors of `dgemma.load` and `Model.submit`.
    """

    def prompt(one: Any) -> Any:
        if not isinstance(one, Mapping):
            return one
        names = PROMPT_COLUMNS if prompt_column is None else (prompt_column,)
        name = next((name for name in names if one.get(name) is not None), None)
        if name is None:
            has = ", ".join(f"{key}" for key in one)
            raise RequestError(f"prompt_column: a row has no {' or '.join(names)} (it has: {has})")
        return one[name]

    if isinstance(model, str):
        import dgemma

        model = dgemma.load(model)
    return model.map((prompt(one) for one in prompts), params, ordered=ordered, errors=errors, think=think, raw=raw)
