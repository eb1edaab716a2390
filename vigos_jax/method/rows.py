"""One sample as the model reads it: its images, the student's turn, every role's turn; and a completion of it."""

import dataclasses
from collections.abc import Mapping

from vigos_jax.data.processor import EncodedImage, Processor, Turn
from vigos_jax.data.views import ORIGINAL, ImageView
from vigos_jax.method.prompts import fill
from vigos_jax.method.roles import TeacherRole
from vigos_jax.method.spans import Spans


@dataclasses.dataclass(frozen=True)
class Row:
    """One sample as the model reads it: its images, the student's turn and one turn per role of the table.

    A row without turns (`student` is None) is a bad row that keeps its slot in the batch.

    Attributes:
      images: the row's own, which the student sees.
      views: per view other than the original, the images that its roles see instead.
      controls: one per role, its turn without an image if `TeacherRole.has_control`; () where no role has one.
    """

    images: tuple[EncodedImage, ...] = ()
    student: Turn | None = None
    teachers: tuple[Turn, ...] = ()
    controls: tuple[Turn | None, ...] = ()
    views: Mapping[ImageView, tuple[EncodedImage, ...]] = dataclasses.field(default_factory=dict)

    def images_of(self, view: ImageView) -> tuple[EncodedImage, ...]:
        """What a role with this view sees; a bad row has nothing to see."""
        if view == ORIGINAL:
            return self.images
        return self.views[view] if view.is_read and self.student is not None else ()

    def turn(self, role: int, *, is_control: bool) -> Turn:
        """What a role, or its control, reads of a row that is not bad."""
        turn = self.controls[role] if is_control else self.teachers[role]
        if turn is None:
            raise ValueError(f"role {role} has no control")
        return turn

    @property
    def prompt(self) -> Turn:
        """The student's turn of a row that is not bad."""
        if self.student is None:
            raise ValueError("a bad row has no prompt")
        return self.student


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One completion of a row.

    Attributes:
      ids: sampled token ids, with the end-of-sequence token if it was sampled.
      spans: where its parts are.
      logps: log-probability of each token as the engine computed it, from the model's own distribution: no
        temperature, no penalties, no truncation. None for rollouts read from a file.
    """

    ids: tuple[int, ...]
    spans: Spans
    logps: tuple[float, ...] | None = None


def make_row(  # noqa: PLR0913  (what a sample and its prompts are made of)
    images: tuple[EncodedImage, ...],
    *,
    problem: str,
    student: Mapping[str, str],
    processor: Processor,
    roles: tuple[TeacherRole, ...] = (),
    reference: str = "",
    fields: Mapping[str, str] | None = None,
    views: Mapping[ImageView, tuple[EncodedImage, ...]] | None = None,
) -> Row:
    """Builds a row: tokenises the student's prompt and the prompt of every role.

    Args:
      images: the row's own, which the student sees.
      student: `user` and `assistant_prefill`, as in `config.prompts.student`.
      roles: the teachers; () for a row that is answered but not scored.
      reference: the answer, which only the roles' templates may show.
      fields: texts of further columns by name, which only the roles' templates may show.
      views: the images of every view of `roles` whose `is_read` is true.

    Raises:
      InputError: the student's template asks for the reference.
    """

    def turn(seen: tuple[EncodedImage, ...], text: str, prefill: str) -> Turn:
        return processor.encode_turn(
            user_text=text,
            assistant_prefill=prefill,
            grids=[image.grid for image in seen],
            labels=[image.label for image in seen],
            continues=[image.continues for image in seen],
        )

    shown = {"problem": problem, "reference": reference} | dict(fields or {})
    question = turn(images, fill(student["user"], problem=problem), student["assistant_prefill"])
    row = Row(images=images, student=question, views=views or {})
    texts = [(fill(r.user, **shown), r.assistant_prefill) for r in roles]
    teachers = [turn(row.images_of(r.view), *text) for r, text in zip(roles, texts, strict=True)]
    controls = [turn((), *text) if r.has_control else None for r, text in zip(roles, texts, strict=True)]
    return dataclasses.replace(row, teachers=tuple(teachers), controls=tuple(controls) if any(controls) else ())
