"""Comparison of answers."""


def normalise_answer(answer: str) -> str:
    """Key under which answers count as equal: white space, letter case and a final full stop do not matter."""
    return "".join(answer.split()).casefold().removesuffix(".")
