"""What arguments and recipes mean: the five traps of the design first, then the rest of the grammar."""

from pathlib import Path

import pytest

from ssl_pipeline.config import Config, ConfigError, dump, load, read_yaml, validate


class PlacesConfig(Config):
    shards: str | tuple[str, ...] | None


class SharesConfig(Config):
    shares: tuple[str, ...]


def test_scientific_notation_is_a_number(read):
    assert read().optim.lr.value == 5e-4
    assert read("optim.lr=2e-3").optim.lr.value == 2e-3


def test_true_is_no_float(refusal):
    assert refusal("optim.clip_norm=true") == "optim.clip_norm must be a valid number. Got True."
    assert refusal("optim.lr=true") == "optim.lr.value must be a valid number. Got True."


def test_a_section_that_the_recipe_does_not_mention_keeps_its_other_defaults(read):
    momentum = read("method.teacher_momentum.value=0.9995").method.teacher_momentum
    assert (momentum.value, momentum.final, momentum.warmup, momentum.start) == (0.9995, 1.0, "5%", 0.9)


def test_suggestions_are_those_of_the_chosen_method(refusal):
    told = refusal("method.num_prototype=3")
    assert told == "Unknown key 'method.num_prototype'. Did you mean 'method.num_prototypes'?"
    # the other method has it, this one has not
    told = refusal("method.num_prototypes=3", recipe="contrast_small")
    assert told == "Unknown key 'method.num_prototypes'. Known here: name, temperature, projector_dim"


def test_a_bare_number_on_a_schedule_keeps_warmup_and_decay(read):
    lr = read("optim.lr=1e-3").optim.lr
    assert (lr.value, lr.warmup, lr.final, lr.decay) == (1e-3, "10ep", 1e-6, "cosine")
    momentum = read("method.teacher_momentum=0.99").method.teacher_momentum
    assert (momentum.value, momentum.final, momentum.start) == (0.99, 1.0, 0.9)


def test_a_bare_number_in_a_recipe_makes_room_for_the_keys_of_a_schedule(read):
    lr = read("optim.lr.warmup=3ep", recipe="contrast_small").optim.lr
    assert (lr.value, lr.warmup) == (0.1, "3ep")


def test_an_inline_section_keeps_what_it_does_not_mention(read):
    lr = read("optim.lr={value: 1e-3, final: 0.0}").optim.lr
    assert (lr.value, lr.final, lr.warmup) == (1e-3, 0.0, "10ep")


@pytest.mark.parametrize(
    "text", ["no", "yes", "on", "off", "2024", "007", "1e3", "08", "0x1F", "12:30:00", "a: b", "x#y"]
)
def test_text_keys_take_the_text_as_it_stands(read, text):
    config = read(f"output={text}", f"data.shards={text}")
    assert config.output == Path(text)
    assert config.data.shards == text
    assert validate(type(config), read_yaml(dump(config), where="dump")) == config


@pytest.mark.parametrize("text", ["*.tar", "[a", "{0..9}.tar", "%x", "@here", "!x", "'a", "{a", "a: b: c", "&a"])
def test_text_keys_need_no_yaml(read, text):
    assert read(f"data.shards={text}").data.shards == text


@pytest.mark.parametrize("text", ["yes", "on", "1", "True", "no"])
def test_only_true_and_false_are_boolean(refusal, text):
    assert refusal(f"compile={text}").startswith("compile must be a valid boolean. Got ")


def test_no_is_text(read):
    assert read("precision=no").precision == "no"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a,b", ("a", "b")),
        ("[a, b-{0..3}.tar]", ("a", "b-{0..3}.tar")),
        ("{x,y}/*-{000..003}.tar,~/z", ("{x,y}/*-{000..003}.tar", "~/z")),
        ('["a,b", c: d]', None),
        ('["a,b", "{c"]', ("a,b", "{c")),
        ("{x,y}", "{x,y}"),
        ("[a]", ("a",)),
        ("2024", "2024"),
    ],
)
def test_lists_of_places_need_no_quotes_and_braces_keep_their_commas(text, parts):
    if parts is None:
        with pytest.raises(ConfigError, match=r"shards"):
            load(PlacesConfig, [f"shards={text}"])
    else:
        assert load(PlacesConfig, [f"shards={text}"]).shards == parts
    assert load(PlacesConfig, ["shards=null"]).shards is None


def test_a_list_of_texts_takes_a_single_one():
    assert load(SharesConfig, ["shares=1%"]).shares == ("1%",)
    assert load(SharesConfig, ["shares=1%,10%"]).shares == ("1%", "10%")


def test_comma_lists_are_tuples(read):
    config = read("optim.betas=0.9,0.95", "augment.global.blur_prob=0.5,1e-1", "augment.global.scale=0.4,1")
    assert config.optim.betas == (0.9, 0.95)
    assert config.augment["global"].blur_prob == (0.5, 0.1)
    assert config.augment["global"].scale == (0.4, 1.0)
    assert read("data.sizes=10,20,30").data.sizes == (10, 20, 30)
    assert read("data.sizes=[10, 20]").data.sizes == (10, 20)


def test_one_value_is_a_tuple_of_one_only_where_a_tuple_is_needed(read):
    assert read("data.sizes=10").data.sizes == (10,)
    assert read("augment.global.blur_prob=0.5").augment["global"].blur_prob == 0.5


def test_null_unsets(read):
    config = read("optim.lr.final=null", "optim.clip_norm=null", "output=null")
    assert (config.optim.lr.final, config.optim.clip_norm, config.output) == (None, None, None)


def test_null_leaves_an_entry_of_a_free_section_out(read):
    config = read("augment.local=null", "arguments.img_size=null", "arguments.depth=2")
    assert set(config.augment) == {"global"}
    assert config.arguments == {"depth": 2}


def test_numbers_are_decimal(read):
    assert read("seed=010").seed == 10
    assert read("seed=08").seed == 8


def test_new_entries_of_a_free_section_are_read_like_the_others(read):
    views = read("augment.more.size=8", "augment.more.blur_prob=0.5").augment["more"]
    assert (views.size, views.blur_prob, views.count) == (8, 0.5, 1)


def test_arguments_apply_in_any_order(read):
    assert read("optim.lr.warmup=5", "optim.lr=1e-3") == read("optim.lr=1e-3", "optim.lr.warmup=5")


def test_a_recipe_may_be_a_file_anywhere(schema, tmp_path, recipes):
    path = tmp_path / "mine.yaml"
    path.write_text((recipes / "distil_small.yaml").read_text())
    assert load(schema, [f"recipe={path}"], recipes=recipes).recipe == str(path)


def test_scalars_may_be_shared_by_name_in_a_recipe(schema):
    text = "method: {name: distil}\naugment: {a: {size: &size 32}, b: {size: *size}}\n"
    text += "optim: {name: sgd, lr: 1}\ndata: {shards: x, batch_size: 4}\n"
    assert validate(schema, read_yaml(text, where="here")).augment["b"].size == 32


def test_without_recipes_all_settings_come_from_the_command_line(schema):
    argv = ["method.name=contrast", "augment.view.size=8", "optim.name=sgd", "optim.lr=0.1", "data.shards=x"]
    argv += ["data.batch_size=4"]
    assert load(schema, argv).optim.lr.value == 0.1
    with pytest.raises(ConfigError, match=r"^data\.shards is missing: set data\.shards=\.\.\.$"):
        load(schema, [argument for argument in argv if "shards" not in argument])


def test_settings_are_read_only(read):
    with pytest.raises(ValueError, match="frozen"):
        read().seed = 3


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("output=5e-4", "data.shards=Null", "arguments.name='no'", "arguments.tag='08'"),
        ("optim.lr.warmup=7", "optim.lr.final=1e-12", "augment.global.blur_prob=[0.3333333333333333, 1]"),
        (f"data.shards={'a long path with spaces ' * 20}", "output=ends with: "),
    ],
)
def test_what_is_printed_reads_back_equal(read, schema, argv):
    config = read(*argv)
    assert validate(schema, read_yaml(dump(config), where="dump")) == config
