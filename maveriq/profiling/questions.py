"""Multiple-choice questions in the layout of MMLU, and the prompts that ask them.

A file has a row for each question, without a header: question, four choices, and the letter of the right one
(https://github.com/hendrycks/test). A folder has a file for each subject, such as anatomy_test.csv.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from maveriq.errors import InputError
from maveriq.files import is_folder
from maveriq.input_files import read_text

LETTERS = ("A", "B", "C", "D")
"""The choices."""

_CELLS = 1 + len(LETTERS) + 1
_HEADER = ("question", *LETTERS, "answer")
_MAX_QUESTIONS, _MAX_FILES = 100_000, 1_000
_SPLIT = re.compile(r"_(test|dev|val|validation|train|auxiliary_train)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A multiple-choice question.

    Args:
        subject: what it is about: the name of its file, without the part of the data set.
        text: the question.
        choices: four answers.
        answer: the index of the right one.
    """

    subject: str
    text: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path, *, what: str = "questions") -> list[Question]:
    """Read a file of questions, or all CSV files of a folder in the order of their names.

    Args:
        path: the file or folder.
        what: the kind of file, for messages.

    Raises:
        InputError: there are none, a row does not have six cells, or an answer is no letter from A to D.
    """
    files = sorted(path.glob("*.csv")) if is_folder(path) else [path]
    if not files:
        raise InputError(f"{what} {str(path)!r}: the folder has no CSV file")
    if len(files) > _MAX_FILES:
        raise InputError(f"{what} {str(path)!r}: the folder has {len(files)} CSV files; at most {_MAX_FILES} are read")
    found = [question for file in files for question in _questions_of(file, what)]
    if len(found) > _MAX_QUESTIONS:
        raise InputError(f"{what} {str(path)!r} has {len(found):,} questions; at most {_MAX_QUESTIONS:,} are read")
    return found


def _questions_of(path: Path, what: str) -> list[Question]:
    text = read_text(path, what=what)
    subject = _SPLIT.sub("", path.stem)
    found = []
    try:
        reader = csv.reader(text.splitlines(keepends=True), strict=True)
        for number, cells in enumerate(reader, 1):
            if not cells or (number == 1 and [cell.strip() for cell in cells] == list(_HEADER)):
                continue
            found.append(_question(cells, subject, f"{what} {str(path)!r}, line {reader.line_num}"))
    except csv.Error as error:
        raise InputError(f"{what} {str(path)!r} is no CSV file: {error}") from None
    if not found:
        raise InputError(f"{what} {str(path)!r} has no questions")
    return found


def _question(cells: Sequence[str], subject: str, where: str) -> Question:
    if len(cells) != _CELLS:
        raise InputError(f"{where}: a question has {_CELLS} cells ({', '.join(_HEADER)}), not {len(cells)}")
    text, *choices, answer = (cell.strip() for cell in cells)
    if answer not in LETTERS:
        raise InputError(f"{where}: the answer must be one of {', '.join(LETTERS)}, not {answer[:20]!r}")
    return Question(subject=subject, text=text, choices=tuple(choices), answer=LETTERS.index(answer))


def prompt_of(question: Question, examples: Sequence[Question] = ()) -> str:
    """Return the prompt of a question, which ends where the letter of the answer is to follow.

    Args:
        question: the question.
        examples: questions that stand before it, with their answers (few-shot).
    """
    subject = question.subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {subject}."
    asked = [f"{_asked(example)} {LETTERS[example.answer]}" for example in examples]
    return "\n\n".join([head, *asked, _asked(question)])


def _asked(question: Question) -> str:
    choices = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return "\n".join([question.text, *choices, "Answer:"])


def examples_for(question: Question, examples: Sequence[Question], shots: int) -> list[Question]:
    """Return the first `shots` examples of a question's subject."""
    return [example for example in examples if example.subject == question.subject][:shots]
