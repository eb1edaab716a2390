"""`--mode generate`: one image, one question, the answer as it is written; or a quick look at the demo."""

import contextlib
import pathlib
from collections.abc import Iterator

from PIL import Image

from vigos_jax.data.cleaning import clean_problem
from vigos_jax.data.images import BadImage, read_image
from vigos_jax.data.markers import MarkerMismatch
from vigos_jax.data.visuals import TooLong, Visual
from vigos_jax.demo.scenes import describe
from vigos_jax.demo.world import WORLDS
from vigos_jax.demo.world import item as item_at
from vigos_jax.errors import InputError
from vigos_jax.models.variables import Variables
from vigos_jax.rollouts.engine import EngineFactory, NativeEngine
from vigos_jax.rollouts.parse import prompt_row
from vigos_jax.rollouts.sampler import row_keys
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.session import Session


def stream(session: Session, trained: Variables, config, *, open_engine: EngineFactory = NativeEngine) -> Iterator[str]:
    """Yields the answer's text in pieces; of the demo's model without image and question, `quick_look`.

    Raises:
      InputError: no question, or an image that cannot be read.
    """
    if config.model.path in WORLDS and not (config.generate.image or config.generate.question):
        yield from quick_look(session, trained, config, open_engine)
        return
    if not config.generate.image or not config.generate.question.strip():
        raise InputError("--mode generate needs --config.generate.image=FILE and --config.generate.question='...'")
    try:
        image = read_image(str(pathlib.Path(config.generate.image).expanduser().absolute()), image_roots=("/",))
        problem = clean_problem(config.generate.question)
        yield from _answer(session, trained, config, image, problem, open_engine)
    except BadImage as e:
        raise InputError(f"config.generate.image={config.generate.image!r} must be an image: {e}") from e
    except MarkerMismatch as e:
        raise InputError(f"config.generate.question={config.generate.question!r}: {e}; it needs as many") from e
    except TooLong as e:
        raise InputError(f"config.generate.question: {e.kind}, {e}; raise the largest of config.buckets") from e


def quick_look(session: Session, trained: Variables, config, open_engine: EngineFactory) -> Iterator[str]:
    """Yields an image that agrees with what one expects and one that contradicts it, in words, and the answers."""
    for k, setting in enumerate(("prior", "conflict")):
        item = item_at(config.demo_eval.seed, 0, setting=setting, world=config.model.path)
        usual = "as usual" if setting == "prior" else f"usually {item.prior_value}"
        yield "\n\n" * bool(k) + f"image     {describe(item.scene.things)}\n"
        yield f"question  {item.question}\nright     {item.answer} ({usual})\nanswer    "
        for piece in _answer(session, trained, config, item.pil_image, item.question, open_engine):
            yield piece.replace("\n", " ")


def _answer(
    session: Session, trained: Variables, config, image: Image.Image, problem: str, open_engine: EngineFactory
) -> Iterator[str]:
    """Yields the student's completion, prefill included; raises BadImage and TooLong."""
    student = config.prompts.student.to_dict()
    row = prompt_row([Visual((image,))], session, config, problem=problem, student=student)
    copies = session.whole_batch(1)  # one row cannot be split: every data slot of the mesh gets a copy of it
    said = text = ""
    with contextlib.closing(open_engine(session, Sampling(**config.sampling))) as engine:
        engine.sync(trained)
        prepared = engine.prepare([row] * copies)
        yield config.prompts.student.assistant_prefill
        for completions in engine.stream(prepared, row_keys(config.seed, 0, copies)):
            if reason := completions.failure(0):
                raise InputError(f"the answer could not be sampled: {reason}; see the log of the server, or try again")
            text = session.processor.decode([i for i in completions.ids[0] if i not in session.processor.eos_ids])
            # A character may be split between pieces; hold it back until it is whole.
            ready = text.rstrip("\ufffd")
            yield ready[len(said) :]
            said = ready
    yield text[len(said) :]
