"""`images=FOLDER` and `recipe=auto`: what they mean, as the arguments that pretraining knows.

The folder (or zip) is packed into shards in the run's directory by the first process, once; the recipe is chosen by
what is in them and by the machine. Both are decided at the first start and found again by every later one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ssl_pipeline.commands.before_packing import check_before_packing
from ssl_pipeline.commands.first_look import Look, look_at_files, look_at_shards
from ssl_pipeline.commands.recipe_choice import AUTO, RecipeChoice, without_keys
from ssl_pipeline.commands.trial import expected_time
from ssl_pipeline.commands.watched_images import watch
from ssl_pipeline.config import Config, ConfigError, Value, launched_processes, launched_rank, printable
from ssl_pipeline.config.arguments import keys_of, leaves
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.packing.candidates import find_candidates, no_images
from ssl_pipeline.packing.conversion import is_image_name
from ssl_pipeline.packing.images_as_shards import holds_shards, packed
from ssl_pipeline.packing.packed_once import SHARDS, is_current, is_packed
from ssl_pipeline.packing.sources import DIGITS
from ssl_pipeline.packing.sources import open_source as open_files

NEEDED = "a folder or a zip of images, or shards"


def expand(
    arguments: Sequence[str],
    overrides: Mapping[str, Value] | None = None,
    *,
    timed: type[Config] | None = None,
    packs: bool = True,
) -> list[str]:
    """`key=value` arguments with what `images=` and `recipe=auto` set; without these, as they are.

    overrides: values by dotted keys that the run will have too. timed: the settings of a run, if wrong ones are to be
    reported before images are packed, and a choice is to come with its expected time, for which a part of it is run
    only by the first process; never if train.steps is given. packs: whether images are packed, by the first process,
    for which all others wait; otherwise nothing is written. Raises ConfigError or DataError.
    """
    overrides = overrides or {}
    given = keys_of(arguments) | {key: "null" if value is None else str(value) for key, value in leaves(overrides)}
    _check_given(given)
    images, recipe, first = given.get("images"), given.get("recipe", ""), launched_rank() == "0"
    if images is None and recipe != AUTO:
        return list(arguments)
    recipe = recipe or AUTO
    output = Path(given["output"] if "output" in given else _directory(images, given, recipe)).expanduser()
    choice = RecipeChoice(recipe, output, given)
    rest = [argument for argument in arguments if argument.partition("=")[0] != "recipe"]
    last = [] if "output" in given else [f"output={output}"]

    def after(shards: str) -> list[str]:
        return [*rest, *([] if images is None else [f"data.shards={shards}"]), *last]

    def refuse_wrong(look: Look, shards: str) -> None:
        if timed is not None and first and not choice.has_begun:
            settings = [*choice.arguments(look), *after(shards)]
            check_before_packing(timed, settings, overrides, num_images=look.count)

    if images is None:
        shards = given["data.shards"]
        look = look_at_shards(open_shards(shards))
        refuse_wrong(look, shards)
    else:
        shards, look = _as_shards(images, output, choice, refuse_wrong, packs=packs)
    own = choice.arguments(look)
    if choice.is_free and first:
        expected = ""
        if timed is not None and given.get("train.steps", "null") == "null":
            run, processes = [*own, *after(shards)], launched_processes()
            expected = expected_time(timed, run, overrides, num_images=look.count, num_processes=processes)
        _say(f"{choice.why(look)}. {f'{expected}. ' if expected else ''}recipe=NAME chooses another.")
    choice.note_colours(own)
    watched = [] if images is None else watch(look, shards, given, choice.settings)
    return [*without_keys(own, keys_of(watched)), *watched, *after(shards)]


def _check_given(given: Mapping[str, str]) -> None:
    """Raise ConfigError if the keys do not say where the images are, or say it twice."""
    images = given.get("images")
    if images == "":
        raise ConfigError("images= is empty. Set it to a folder or a zip of images.")
    if images is not None and images.startswith("[") and not Path(images).exists():
        raise ConfigError(
            f"images= takes one folder or zip. Got the list {images}. Put them into one folder (links work too), or "
            "make shards of each and set data.shards=[A,B]."
        )
    if images is not None and "data.shards" in given:
        raise ConfigError("images= packs a folder into shards and data.shards= names some. Give one of the two.")
    if images is None and given.get("recipe") == AUTO and "data.shards" not in given:
        raise ConfigError("recipe=auto looks at the images to choose. Set images=FOLDER, or data.shards=SHARDS.")


def _directory(images: str | None, given: Mapping[str, str], recipe: str) -> Path:
    name = Path(images or given["data.shards"]).expanduser().resolve().stem if recipe == AUTO else Path(recipe).stem
    return Path("runs") / (name or "images")


def _as_shards(
    images: str, output: Path, choice: RecipeChoice, refuse_wrong: Callable[[Look, str], None], *, packs: bool
) -> tuple[str, Look]:
    """Where `images` are as shards, packed now if they are not yet, or would be; and a look at them."""
    if holds_shards(images):
        return _looked_at(images, refuse_wrong)
    if Path(images).expanduser().is_file() and is_image_name(images):
        raise ConfigError(f"images={images} is one photograph. Pretraining needs a folder or a zip of many.")
    if images != DIGITS and not Path(images).expanduser().exists() and is_packed(output):
        return _looked_at(_packed_before(images, output, choice), refuse_wrong)
    files = open_files(str(Path(images).expanduser()), key="images", needed=NEEDED)
    if is_packed(output) and (choice.has_begun or is_current(files, output)):
        return _looked_at(packed(images, output, opened=files), refuse_wrong)
    shards = str(output / SHARDS)
    if launched_rank() != "0" and packs:
        packed(images, output, renewed=True, opened=files)
        return shards, look_at_shards(open_shards(shards))
    look = look_at_files(files)
    if not look.count:
        raise ConfigError(no_images("images", images, find_candidates(files)))
    refuse_wrong(look, shards)
    short_side, why = choice.short_side(look)
    if short_side is not None:
        _say(why)
    if not packs:
        _say(f"{look.count:,} images of {images} would be packed into {shards}; nothing is written now.")
        return shards, look
    packed(images, output, renewed=True, short_side=short_side, opened=files)
    return shards, look_at_shards(open_shards(shards))


def _packed_before(images: str, output: Path, choice: RecipeChoice) -> str:
    """The shards of a run whose folder is gone; ConfigError, with what works, unless it is the folder of this run."""
    shards = str(output / SHARDS)
    if choice.images is None or Path(choice.images) != Path(images).expanduser():
        of_it = "" if choice.images is None else f" of {choice.images}"
        raise ConfigError(
            f"images='{images}' does not exist. {output} has the images{of_it} that were packed into it: "
            f"images={shards} output={output} trains on those."
        )
    if launched_rank() == "0":
        _say(f"images={images} is gone. The run goes on with its images as they were packed, in {shards}.")
    return shards


def _looked_at(shards: str, refuse_wrong: Callable[[Look, str], None]) -> tuple[str, Look]:
    """Shards that are there, with a look at them."""
    look = look_at_shards(open_shards(shards))
    refuse_wrong(look, shards)
    return shards, look


def _say(text: str) -> None:
    print(printable(text), flush=True)
