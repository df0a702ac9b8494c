"""What a user is told: one sentence per mistake, all at once, and never a traceback."""

import random
from collections.abc import Callable

import pytest
from pydantic import BaseModel, model_validator

from ssl_pipeline.config import Config, ConfigError, load, read_yaml

KEYS = "recipe, output, seed, precision, compile, arguments, method, augment, optim, data"
DURATION = "a duration is a number of steps (1250), of epochs ('10ep') or a share of the run ('5%')."

TYPOS = [
    # keys that do not exist
    ("optm.lr=1e-3", "Unknown key 'optm'. Did you mean 'optim'?"),
    ("optim.lr.valeu=1", "Unknown key 'optim.lr.valeu'. Did you mean 'optim.lr.value'?"),
    ("optim.learning_rate=1", "Unknown key 'optim.learning_rate'. Did you mean 'optim.lr'?"),
    ("lr=1e-3", "Unknown key 'lr'. Did you mean 'optim.lr'?"),
    ("num_prototypes=3", "Unknown key 'num_prototypes'. Did you mean 'method.num_prototypes'?"),
    ("temperature=0.1", f"Unknown key 'temperature'. Known here: {KEYS}"),
    ("batch_size=3", "Unknown key 'batch_size'. Did you mean 'data.batch_size'?"),
    ("augment.global.blr_prob=1", "Unknown key 'augment.global.blr_prob'. Did you mean 'augment.global.blur_prob'?"),
    (
        "method.contrast=1",
        "Unknown key 'method.contrast'. Known here: name, num_prototypes, teacher_momentum, freeze_for",
    ),
    ("a.b.c=1", f"Unknown key 'a'. Known here: {KEYS}"),
    ("seed.x=1", "Unknown key 'seed.x'. seed takes a value; it is not a section."),
    ("seed.value=1", "Unknown key 'seed.value'. seed takes a value; it is not a section."),
    ("optim.lr.value.x=1", "Unknown key 'optim.lr.value.x'. optim.lr.value takes a value; it is not a section."),
    (
        "augment.global.size.x=1",
        "Unknown key 'augment.global.size.x'. augment.global.size takes a value; it is not a section.",
    ),
    # values of the wrong type
    ("seed=fast", "seed must be a valid integer. Got 'fast'."),
    ("seed=1.0", "seed must be a valid integer. Got 1.0."),
    ("seed=", "seed must be a valid integer. Got None."),
    ("seed='1'", "seed must be a valid integer. Got '1'."),
    ("seed=2001-01-01", "seed must be a valid integer. Got '2001-01-01'."),
    ("seed=-1", "seed must be at least 0. Got -1."),
    ("data.batch_size=0", "data.batch_size must be at least 1. Got 0."),
    ("data.shards=null", "data.shards must be a valid string. Got None."),
    ("data.shards=None", "data.shards must not be the word None."),
    ("output=None", "output must not be the word None. Write null."),
    ("optim.lr=[1, 2]", "optim.lr.value must be a valid number. Got [1, 2]."),
    ("optim.lr=.nan", "optim.lr.value must be a finite number. Got nan."),
    ("optim.clip_norm=1e999", "optim.clip_norm must be a finite number. Got inf."),
    ("compile=1", "compile must be a valid boolean. Got 1."),
    ("precision=fp32", "precision must be one of bf16, no. Got 'fp32'. Write no."),
    ("compile=True", "compile must be a valid boolean. Got 'True'. Write true."),
    ("compile=off", "compile must be a valid boolean. Got 'off'. Write false."),
    ("optim.name=adam", "optim.name must be one of adamw, sgd. Got 'adam'. Did you mean 'adamw'?"),
    (
        "optim.lr.decay=cosin",
        "optim.lr.decay must be one of cosine, linear, cosine_arc, cosine_7_16, steps. Got 'cosin'. "
        "Did you mean 'cosine'?",
    ),
    ("optim.betas=[1,2,3]", "optim.betas must have 2 values. Got 3."),
    ("optim.betas=0.9", "optim.betas must have 2 values. Got 1."),
    ("optim.betas=[]", "optim.betas must have 2 values. Got 0."),
    ("optim.betas=0.9,x", "optim.betas[1] must be a valid number. Got 'x'."),
    ("data.sizes=1,2,x", "data.sizes[2] must be a valid integer. Got 'x'."),
    ("augment.global.blur_prob=x", "augment.global.blur_prob must be a valid number. Got 'x'."),
    (
        "arguments.x=[1]",
        "arguments.x must be a valid boolean or a valid integer or a valid number or a valid string. Got [1].",
    ),
    ("optim.lr.warmup=ten", f"optim.lr.warmup: {DURATION} Got 'ten'."),
    ("optim.lr.warmup=5%ep", f"optim.lr.warmup: {DURATION} Got '5%ep'."),
    ("optim.lr.warmup=-1ep", f"optim.lr.warmup: {DURATION} Got '-1ep'."),
    ("optim.lr.warmup=1.5", "optim.lr.warmup must be a valid integer or a valid string. Got 1.5."),
    ("method.freeze_for=-3", "method.freeze_for: a duration cannot be negative. Got -3."),
    # sections
    (
        "optim=adamw",
        "optim is a section with the keys name, lr, betas, clip_norm. Got 'adamw'. Write optim.name=adamw.",
    ),
    ("optim=null", "optim is a section with the keys name, lr, betas, clip_norm. Got None."),
    ("augment=3", "augment is a section with the keys you choose. Got 3."),
    ("augment.global=3", "augment.global is a section with the keys count, size, scale, blur_prob. Got 3."),
    ("augment.more.count=2", "augment.more.size is missing: set augment.more.size=..."),
    ("method.name=distill", "method.name must be one of distil, contrast. Got 'distill'. Did you mean 'distil'?"),
    (
        "method=contrast",
        "method is a section: set method.name to one of distil, contrast. Got 'contrast'. Write method.name=contrast.",
    ),
    ("method=else", "method is a section: set method.name to one of distil, contrast. Got 'else'."),
    ("method=one", "method is a section: set method.name to one of distil, contrast. Got 'one'."),
    # two keys that do not go together
    ("augment.global.count=3", "augment.global.blur_prob must have one value or one per view (count=3)."),
    # no key=value
    ("=1", "'=1' is not of the form key=value."),
    (".=1", "'.=1' is not of the form key=value."),
    ("optim..lr=1", "'optim..lr=1' is not of the form key=value."),
    ("optim.=1", "'optim.=1' is not of the form key=value."),
    ("seed", "'seed' is not of the form key=value."),
    ("--seed=3", "'--seed=3' is not of the form key=value. Try seed=3."),
    ("--foo", "'--foo' is not of the form key=value. Try foo=VALUE."),
    # no YAML, or more than plain YAML
    ("seed=[1", "seed=[1, line 1: not valid YAML (expected ',' or ']', but got '<stream end>')."),
    ("optim={lr:1}", "optim={lr:1}, line 1: 'lr:1' needs a space after the colon."),
    ("optim={lr: 1, lr: 2}", "optim={lr: 1, lr: 2}, line 1: 'lr' is given twice in one section."),
    ("optim={1: 2}", "optim={1: 2}, line 1: a key must be text. Got 1."),
    ("optim={[1]: 2}", "optim={[1]: 2}, line 1: a key must be text. Got [1]."),
    ("seed=!foo 1", "seed=!foo 1, line 1: tags are not allowed. Got '!foo'; write a plain value."),
    ("seed=&a [*a]", "seed=&a [*a], line 1: '*a' stands for a whole section; write the section out."),
    ("seed=*a", "seed=*a, line 1: not valid YAML (found undefined alias 'a')."),
]


@pytest.mark.parametrize(("argument", "sentence"), TYPOS)
def test_a_mistake_is_told_in_one_sentence(refusal, argument, sentence):
    assert refusal(argument) == sentence


def test_all_mistakes_are_told_at_once(refusal):
    assert refusal("seed=x", "optm.lr=3", "data.batch_size=0", "method.nam=3", "lr=4", "augment.global.size=big") == (
        "seed must be a valid integer. Got 'x'.\n"
        "Unknown key 'method.nam'. Did you mean 'method.name'?\n"
        "augment.global.size must be a valid integer. Got 'big'.\n"
        "data.batch_size must be at least 1. Got 0.\n"
        "Unknown key 'optm'. Did you mean 'optim'?\n"
        "Unknown key 'lr'. Did you mean 'optim.lr'?"
    )
    assert refusal("seed", "--x").count("\n") == 1
    assert refusal("seed=[", "compile={").count("\n") == 1


def test_a_mistake_of_the_whole_is_told_without_a_place(refusal):
    assert refusal("compile=true", "precision=bf16") == "compile works with precision=no only."


def test_a_key_given_twice_is_a_mistake(refusal):
    assert refusal("seed=1", "seed=2") == "seed is given twice: '1' and '2'."
    assert refusal("recipe=contrast_small") == "recipe= is given 2 times; one run has one recipe."


def test_an_unknown_recipe_is_told_with_the_nearest(refusal):
    told = refusal(recipe="distil_smal")
    assert told == "No recipe 'distil_smal'. Did you mean 'distil_small'? Known: contrast_small, distil_small"
    assert refusal(recipe="none.yaml") == "No recipe 'none.yaml'. Known: contrast_small, distil_small"
    assert refusal(recipe="") == "No recipe ''. Known: contrast_small, distil_small"


def test_a_missing_recipe_is_hinted_at(schema, recipes):
    with pytest.raises(ConfigError) as caught:
        load(schema, [], recipes=recipes)
    lines = str(caught.value).splitlines()
    assert lines[0] == "No recipe is given: recipe=NAME, one of contrast_small, distil_small"
    assert lines[1] == "method is missing: set method.KEY=..."
    assert lines[2] == "augment is missing: set augment.NAME.KEY=..."


def test_a_mistyped_key_without_a_recipe_is_told_alone(schema, recipes):
    with pytest.raises(ConfigError) as caught:
        load(schema, ["optm.lr=1"], recipes=recipes)
    assert str(caught.value) == "Unknown key 'optm'. Did you mean 'optim'?"


def test_a_section_is_not_named_twice():
    class Inner(Config):
        number: int

        @model_validator(mode="after")
        def _even(self):
            raise ValueError(f"inner.number must be even. Got {self.number}.")

    class Outer(Config):
        inner: Inner

    with pytest.raises(ConfigError) as caught:
        load(Outer, ["inner.number=3"])
    assert str(caught.value) == "inner.number must be even. Got 3."


def test_the_command_is_named(schema):
    with pytest.raises(ConfigError, match=r"\nSee: python -m toy --help$"):
        load(schema, ["seed=x"], command="python -m toy")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"seed: 1\nseed: 2\n", ", line 1: 'seed' is given twice in one section."),
        (b"seed: 1\noptim:\n  lr: [1\n", ", line 4: not valid YAML (expected ',' or ']', but got '<stream end>')."),
        (b"seed: 1\noptim: !!python/name:os.system\n", ", line 2: tags are not allowed. Got 'tag:yaml.org"),
        (b"a: &a [1]\nb: *a\n", ", line 2: '*a' stands for a whole section; write the section out."),
        (b"seed: \x00\n", ": not valid YAML (unacceptable character"),
        (b"\xff\xfe\x00", " is not UTF-8 text: byte 0 is not valid."),
        (b"", " must hold keys and values. Got None."),
        (b"- 1\n", " must hold keys and values. Got [1]."),
        (b"[" * 1000, ": nested too deeply."),
    ],
)
def test_an_unreadable_recipe_is_told_with_its_line(schema, recipes, tmp_path, content, sentence):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(schema, [f"recipe={path}"], recipes=recipes)
    assert str(caught.value).startswith(f"{path}{sentence}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["!!python/object/apply:os.mkdir [{made}]", "!!python/object/new:os.mkdir [{made}]"])
def test_yaml_never_runs_code(refusal, tmp_path, value):
    made = tmp_path / "made"
    assert "tags are not allowed" in refusal(f"seed={value.format(made=made)}")
    assert not made.exists()


@pytest.mark.parametrize("depth", [400, 1050])
def test_deep_nesting_is_refused(schema, refusal, depth):
    assert "\n" not in refusal("arguments." + "a." * depth + "a=1")
    assert "\n" not in refusal("seed=" + "[" * (depth // 4) + "]" * (depth // 4))
    with pytest.raises(ConfigError):
        load(schema, ["a." * depth + "a=1"])


def test_a_number_of_thousands_of_digits_is_refused(refusal):
    assert "not valid YAML" in refusal("seed=" + "9" * 5000)


def known_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


# keys and values that a random command line is put together from
MORE_KEYS = """
    method.name method.num_prototypes method.teacher_momentum.final method.distil method.distil.name
    augment.global.blur_prob augment.new.size arguments.depth x
"""
VALUES = """
    1 -1 0.5 1e9 true null ~ '' [] {} [1,2] [[]] x a,b 1,2 ,1 , {a:1} {name:sgd} 10ep 5% distil contrast *a [null]
"""
VALUES_WITH_SPACES = ["", " ", "{name: contrast}", "{value: 1}", "{value: {value: 1}}", "{a: {b: [1]}}", "- 1", "a: b"]
YAML_PIECES = [*"[]{},#%'\"|>a1\n", ": ", "- ", "  ", "&a ", "*a", "!x ", "!!int ", "? ", "---\n"]


def refusal_of(action: Callable[[], object]) -> str | None:
    """The sentences of a ConfigError, None if there is none; any other exception passes."""
    try:
        action()
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.other
def test_random_arguments_give_settings_or_sentences(read, schema):
    generator = random.Random(20)
    keys = [*known_keys(schema), *MORE_KEYS.split(), ""]
    values = [*VALUES.split(), *VALUES_WITH_SPACES]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(400):
        argv = []
        for _ in range(generator.randint(1, 3)):
            key = generator.choice(keys)
            if generator.random() < 0.2:
                key += "." + generator.choice(["value", "x", "name", "0", ""])
            if generator.random() < 0.1:
                key = key.replace("e", generator.choice(["", "E", "ee", "."]), 1)
            argv.append(f"{key}={generator.choice(values)}")
        told = refusal_of(lambda argv=argv: read(*argv))
        assert told is None or all(sentence.strip() for sentence in told.split("\n")), argv
        outcomes["read" if told is None else "refused"] += 1
    assert min(outcomes.values()) > 10, outcomes


def test_random_yaml_gives_values_or_one_sentence():
    generator = random.Random(21)
    for _ in range(2000):
        text = "".join(generator.choices(YAML_PIECES, k=generator.randint(1, 8)))
        told = refusal_of(lambda text=text: read_yaml(text, where="here"))
        assert told is None or (told.startswith("here") and "\n" not in told), text
