"""TensorFlow's namespace, compared with array-api-strict name by name: signatures, values, dtypes and errors.

Each call is drawn as data and made on array-api-strict and on TensorFlow: eagerly, in a graph with unknown lengths, and
with XLA.
"""

import inspect
import re
from functools import cache
from operator import attrgetter
from pathlib import Path

import array_api_strict as strict
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import xbm
from xbm.backends.namespaces import tensorflow as xp

BEYOND = {"bfloat16", "float16"}  # not in the standard
CONSTANTS = {"inf", "nan"}
DTYPES = {name for name in xp.__all__ if isinstance(getattr(xp, name), tf.DType)}
EXTENSION = {f"linalg.{name}" for name in vars(xp.linalg)}
FUNCTIONS = sorted(set(xp.__all__) - DTYPES - CONSTANTS - {"linalg"} | EXTENSION)
ERRORS = (TypeError, ValueError, IndexError, AttributeError, tf.errors.OpError)

FLOATS, INTEGERS, BOOLS = ("float32", "float64"), ("int64",), ("bool",)
NUMBERS = FLOATS + INTEGERS
EVERY = NUMBERS + BOOLS

EXAMPLES = settings.default.max_examples
SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)
FIXED = st.just((3, 4))  # XLA compiles for each shape


class Length(int):
    """A length; for TensorFlow, a scalar tensor whose value is unknown at tracing time."""


# Drawing a call: functions of (draw, dtype, shapes) that return (args, kwargs). NumPy's arrays and dtypes stand for the
# library's.


def elements(dtype, *, special=(np.nan, np.inf, -np.inf)):
    """Return a strategy for a few values with exact sums, so that there are ties."""
    if dtype == "bool":
        return st.booleans()
    if dtype == "int64":
        return st.integers(-3, 3) | st.sampled_from([2**40 + 5, -(2**40)])
    numbers = st.integers(-8, 8).map(lambda n: n / 4)
    return numbers | st.sampled_from([-0.0, *special])


def array(draw, dtype, shape, **options):
    return draw(hnp.arrays(dtype, shape, elements=elements(dtype, **options)))


def number(draw, dtype):
    if dtype == "bool":
        return draw(st.booleans())
    whole = st.integers(-3, 3)
    return draw(whole if dtype == "int64" else whole | st.sampled_from([-0.25, 0.0, 1.5]))


def elementwise(draw, dtype, shapes):
    return (array(draw, dtype, draw(shapes)),), {}


def pair(draw, dtype, shapes):
    """Draw two arrays that broadcast, or an array and a number, in either order."""
    x = array(draw, dtype, draw(shapes))
    y = draw(st.sampled_from(["same", "row", "number"]))
    y = number(draw, dtype) if y == "number" else array(draw, dtype, x.shape if y == "same" else x.shape[1:])
    return (x, y) if draw(st.booleans()) else (y, x)


def binary(draw, dtype, shapes):
    return pair(draw, dtype, shapes), {}


def quotient(draw, dtype, shapes):
    x = array(draw, dtype, draw(shapes), special=())
    if dtype == "bool":
        return (x, x), {}
    nonzero = st.sampled_from([-3, -2, -1, 1, 2, 3])
    return (x, draw(nonzero if draw(st.booleans()) else hnp.arrays(dtype, x.shape, elements=nonzero))), {}


def selection(draw, dtype, shapes):
    x, y = pair(draw, dtype, shapes)
    return (array(draw, "bool", np.shape(x) or np.shape(y)), x, y), {}


def bounds(draw, dtype, shapes):
    low, high = sorted([number(draw, dtype), number(draw, dtype)])
    names = draw(st.sets(st.sampled_from(["min", "max"])))
    return (array(draw, dtype, draw(shapes)),), {name: {"min": low, "max": high}[name] for name in names}


def reduction(draw, dtype, shapes, *, empty=True, several=True, **options):
    """Draw a reduction; `empty` allows reductions over no elements, `several` allows several axes."""
    shape = draw(shapes if empty else shapes.filter(lambda shape: min(shape[-1:]) > 0))
    axes = [axis for axis in range(-len(shape), len(shape)) if empty or shape[axis]]
    axis = st.sampled_from(axes)
    if empty or 0 not in shape:
        axis |= st.none()
        if several:
            axis |= st.lists(st.integers(0, len(shape) - 1), unique=True, min_size=1).map(tuple)
    x = array(draw, dtype, shape, **options)
    return (x,), {"axis": draw(axis), "keepdims": draw(st.booleans())}


def of_some(draw, dtype, shapes):
    return reduction(draw, dtype, shapes, empty=False)


def position(draw, dtype, shapes):
    return reduction(draw, dtype, shapes, empty=False, several=False, special=(np.nan, -np.inf))


def running(draw, dtype, shapes):
    x = array(draw, dtype, draw(shapes))
    axis = st.integers(-x.ndim, x.ndim - 1)
    return (x,), {"axis": draw(axis | st.none() if x.ndim == 1 else axis)}


def order(draw, dtype, shapes, *, axes=None):
    x = array(draw, dtype, draw(shapes), special=(np.nan, -np.inf))
    axis = draw(st.sampled_from(axes or range(-x.ndim, x.ndim)))
    return (x,), {"axis": axis, "descending": draw(st.booleans()), "stable": True}


def ordered(draw, dtype, shapes):
    return order(draw, dtype, shapes, axes=(-1,))


def joined(draw, dtype, shapes):
    shape = draw(shapes)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    parts = [array(draw, dtype, shape) for _ in range(draw(st.integers(1, 3)))]
    return ([np.take(part, range(part.shape[axis] - i % 2), axis) for i, part in enumerate(parts)],), {"axis": axis}


def stacked(draw, dtype, shapes):
    shape = draw(shapes)
    parts = [array(draw, dtype, shape) for _ in range(draw(st.integers(1, 3)))]
    return (parts,), {"axis": draw(st.integers(-len(shape) - 1, len(shape)))}


def reshaped(draw, dtype, shapes):
    x = array(draw, dtype, draw(shapes))
    rest = int(np.prod(x.shape[1:]))
    targets = [x.shape[::-1], (Length(x.shape[0]), rest), (rest, Length(x.shape[0]), 1), *([(-1,)] if x.size else [])]
    return (x, draw(st.sampled_from(targets))), {}


def broadcast(draw, dtype, shapes):
    x = array(draw, dtype, draw(shapes))
    return (x, (Length(draw(st.integers(0, 3))), *x.shape)), {}


def matrix(draw, dtype, shapes):
    return (array(draw, dtype, draw(shapes.filter(lambda shape: len(shape) > 1))),), {}


def invertible(draw, dtype, shapes):
    shape = (3, 3) if shapes is FIXED else draw(st.sampled_from([(1, 1), (3, 3), (2, 3, 3)]))
    x = draw(hnp.arrays("float64", shape, elements=st.integers(-16, 16).map(lambda n: n / 8)))
    return ((x @ x.swapaxes(-1, -2) + np.eye(shape[-1])).astype(dtype),), {}


def search(draw, dtype, shapes):
    x, values = (array(draw, dtype, draw(shapes)[:1], special=()) for _ in range(2))
    return (np.sort(x), values), {"side": draw(st.sampled_from(["left", "right"]))}


def taken(draw, dtype, shapes):
    x = array(draw, dtype, draw(shapes))
    axis = draw(st.integers(-x.ndim, x.ndim - 1))
    indices = draw(hnp.arrays("int64", st.integers(0, 4) if x.shape[axis] else 0, elements=places(x, axis)))
    return (x, indices), {} if x.ndim == 1 and draw(st.booleans()) else {"axis": axis}


def taken_along(draw, dtype, shapes):
    x = array(draw, dtype, draw(shapes))
    shape = (*x.shape[:-1], draw(st.integers(0, 4)) if x.shape[-1] else 0)
    return (x, draw(hnp.arrays("int64", shape, elements=places(x, -1)))), {}


def places(x, axis):
    return st.integers(0, max(x.shape[axis] - 1, 0))


def cast(draw, dtype, shapes):
    x = array(draw, dtype, draw(shapes), special=())
    return (x, np.dtype(draw(st.sampled_from(EVERY)))), {"copy": draw(st.booleans())}


def arrayed(draw, dtype, shapes):
    x = array(draw, dtype, draw(shapes))
    return (x.tolist() if draw(st.booleans()) else x,), {"dtype": np.dtype(dtype)}


def counted(draw, dtype, shapes):
    stop, step = draw(st.integers(0, 6)), draw(st.sampled_from([1, 2, -1]))
    start = stop - step * draw(st.integers(0, 3))  # TensorFlow rejects ranges in the wrong direction
    args = draw(st.sampled_from([(Length(stop),), (start, Length(stop), step)]))
    return args, {"dtype": np.dtype(dtype)}


def shaped(draw, dtype, shapes):
    shape = draw(shapes)
    some = [(), shape, (Length(shape[0]), *shape[1:]), Length(shape[0]), shape[0]]
    return (draw(st.sampled_from(some)),), {"dtype": np.dtype(dtype), "device": None}


def filled(draw, dtype, shapes):
    args, kwargs = shaped(draw, dtype, shapes)
    return (*args, number(draw, dtype)), kwargs


def like(draw, dtype, shapes):
    return (array(draw, draw(st.sampled_from(EVERY)), draw(shapes)),), {"dtype": np.dtype(dtype)}


def filled_like(draw, dtype, shapes):
    (x,), kwargs = like(draw, dtype, shapes)
    return (x, number(draw, dtype)), kwargs


CALLS = {
    "abs": (NUMBERS, elementwise),
    "all": (EVERY, reduction),
    "any": (EVERY, reduction),
    "arange": (NUMBERS, counted),
    "argmax": (NUMBERS, position),
    "argsort": (NUMBERS, order),
    "asarray": (EVERY, arrayed),
    "astype": (EVERY, cast),
    "broadcast_to": (EVERY, broadcast),
    "clip": (NUMBERS, bounds),
    "concat": (EVERY, joined),
    "count_nonzero": (EVERY, reduction),
    "cumulative_sum": (NUMBERS, running),
    "exp": (FLOATS, elementwise),
    "flip": (EVERY, running),
    "full": (EVERY, filled),
    "full_like": (EVERY, filled_like),
    "isfinite": (FLOATS, elementwise),
    "isnan": (FLOATS, elementwise),
    "linalg.inv": (FLOATS, invertible),
    "log": (FLOATS, elementwise),
    "logaddexp": (FLOATS, binary),
    "matrix_transpose": (EVERY, matrix),
    "max": (NUMBERS, of_some),
    "maximum": (NUMBERS, binary),
    "mean": (FLOATS, of_some),
    "min": (NUMBERS, of_some),
    "minimum": (NUMBERS, binary),
    "nextafter": (FLOATS, binary),
    "nonzero": (EVERY, elementwise),
    "ones": (EVERY, shaped),
    "ones_like": (EVERY, like),
    "remainder": (NUMBERS, quotient),
    "reshape": (EVERY, reshaped),
    "searchsorted": (NUMBERS, search),
    "sign": (NUMBERS, elementwise),
    "sort": (NUMBERS, ordered),
    "sqrt": (FLOATS, elementwise),
    "stack": (EVERY, stacked),
    "sum": (NUMBERS, reduction),
    "take": (EVERY, taken),
    "take_along_axis": (EVERY, taken_along),
    "tanh": (FLOATS, elementwise),
    "where": (EVERY, selection),
    "zeros": (EVERY, shaped),
    "zeros_like": (EVERY, like),
}
NO_CALL = {"finfo", "iinfo", "isdtype"}  # take dtypes; tested below
ROUNDED = {"exp", "linalg.inv", "log", "logaddexp", "mean", "sqrt", "tanh"}
VALUES_MAKE_SHAPES = {"nonzero"}  # not supported by XLA

DIFFERENT = {
    ("isfinite", "int64"): "TensorFlow refuses it",
    ("isnan", "int64"): "TensorFlow refuses it",
    **dict.fromkeys([(name, "bool") for name in ("argmax", "argsort", "clip", "sort")], "TensorFlow accepts it"),
    ("arange", "bool"): "NumPy, and so strict, accepts it for up to two values",
}
"""(name, dtype) that only one of the two rejects, and the reason."""


# Making a call


def translated(value, one):
    """Return a call's arguments with `one(leaf)` for each leaf."""
    if isinstance(value, dict):
        return {name: translated(entry, one) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(translated(entry, one) for entry in value)
    return one(value)


def of_strict(name, args, kwargs):
    """Return the result of a call on array-api-strict, as NumPy arrays."""

    def one(leaf):
        if isinstance(leaf, np.dtype):
            return getattr(strict, leaf.name)
        return strict.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf

    flags = strict.ArrayAPIStrictFlags(data_dependent_shapes=True, enabled_extensions=("linalg",))
    with np.errstate(all="ignore"), flags:
        found = attrgetter(name)(strict)(*translated(args, one), **translated(kwargs, one))
    return [np.asarray(x) for x in (found if isinstance(found, tuple) else (found,))]


def of_tensorflow(name, args, kwargs, *, mode):
    """Return the result of a call on TensorFlow, as NumPy arrays."""
    tensors, plan = [], []

    def one(leaf):
        if isinstance(leaf, np.ndarray | Length):
            tensors.append(tf.zeros(leaf) if isinstance(leaf, Length) else tf.convert_to_tensor(leaf))
            plan.append((type(leaf), tensors[-1].dtype.name, tensors[-1].shape.rank))
            return _HANDED_IN
        return leaf

    call = translated((args, kwargs), one)
    run = traced(name, repr(call), tuple(plan), mode, _Unhashed(call))
    found = run(*tensors)
    return [x.numpy() for x in (found if isinstance(found, tuple) else (found,))]


_HANDED_IN = "an array"


class _Unhashed:
    """An object that is equal for all calls."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 0


@cache
def traced(name, _, plan, mode, call):
    """Return a call as a function of its tensors, traced once for all lengths."""

    def function(*tensors):
        kinds, rest = iter(plan), iter(tensors)

        def one(leaf):
            if isinstance(leaf, np.dtype):
                return getattr(xp, leaf.name)
            if leaf is not _HANDED_IN:
                return leaf
            kind, tensor = next(kinds)[0], next(rest)
            return tf.shape(tensor, tf.int64)[0] if kind is Length else tensor

        args, kwargs = translated(call.value, one)
        return attrgetter(name)(xp)(*args, **kwargs)

    if mode == "eager":
        return function
    signature = [tf.TensorSpec([None] * rank, dtype) for _, dtype, rank in plan]
    return tf.function(function, input_signature=signature, autograph=False, jit_compile=mode == "xla")


def close(found, expected):
    tolerance = 2e-6 if found.dtype == np.float32 else 1e-14
    np.testing.assert_allclose(found, expected, rtol=2 * tolerance, atol=tolerance)


def check(data, name, mode, shapes=SHAPES):
    dtypes, make = CALLS[name]
    args, kwargs = make(data.draw, data.draw(st.sampled_from(dtypes)), shapes)
    found, expected = of_tensorflow(name, args, kwargs, mode=mode), of_strict(name, args, kwargs)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        if name in ROUNDED:
            close(mine, theirs)
        else:
            np.testing.assert_array_equal(mine, theirs)


MODES = ("eager", "graph", "xla")


def test_every_name_is_one_of_the_standard_and_is_tested():
    assert set(xp.__all__) - BEYOND <= set(strict.__all__)
    assert {*CALLS} | NO_CALL == {*FUNCTIONS}


def test_every_name_that_the_core_uses_is_there():
    core = Path(xbm.__file__).parent
    packages = [core, core / "losses", core / "mining", core / "compensation"]
    files = [*(file for package in packages for file in package.glob("*.py")), core / "backends" / "standard.py"]
    text = "\n".join(file.read_text() for file in files)
    used = set(re.findall(r"(?:\bxp|array_namespace\(\S+\))\.((?:linalg\.)?[a-z]\w*)", text))
    assert len(used) > 30
    assert used <= set(xp.__all__) | EXTENSION


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_are_those_of_the_standard_as_far_as_they_are_offered(name):
    mine, theirs = (inspect.signature(attrgetter(name)(library)).parameters for library in (xp, strict))
    assert list(mine) == [parameter for parameter in theirs if parameter in mine]
    for parameter in mine:
        ours, standard = mine[parameter], theirs[parameter]
        assert (ours.kind, ours.default) == (standard.kind, standard.default), parameter


@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
def test_eager_calls_are_the_standards(name, data):
    check(data, name, "eager")


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=max(1, EXAMPLES // 2))
@given(data=st.data())
def test_calls_in_a_graph_are_the_standards(name, data):
    check(data, name, "graph")


@pytest.mark.parametrize("name", sorted(set(CALLS) - VALUES_MAKE_SHAPES))
@settings(max_examples=max(1, EXAMPLES // 10))
@given(data=st.data())
def test_calls_under_xla_are_the_standards(name, data):
    check(data, name, "xla", FIXED)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "name", ["argmax", "max", "maximum", "min", "minimum", "clip", "where", "sum", "mean", "logaddexp"]
)
def test_a_nan_is_seen(name, dtype, mode):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 7, 300)).astype(dtype)
    x[3, 200], x[5, 0], y[3, 100], y[6] = np.nan, np.nan, np.nan, -np.inf
    options = {
        "maximum": [((x, y), {}), ((y, x), {}), ((x, 0.5), {}), ((0.5, x), {})],
        "clip": [((x,), {"min": 0.0}), ((x,), {"max": 0.0}), ((x,), {"min": 0, "max": 0.5})],
        "where": [((y > 0, x, 0.0), {}), ((y > 0, 0.0, x), {})],
        "logaddexp": [((x, y), {}), ((y, y), {})],
    }
    options["minimum"] = options["maximum"]
    for args, kwargs in options.get(name, [((x,), {"axis": 1}), ((x,), {"axis": 0, "keepdims": True}), ((x,), {})]):
        (found,), (expected,) = (of_tensorflow(name, args, kwargs, mode=mode), of_strict(name, args, kwargs))
        np.testing.assert_allclose(found, expected, rtol=1e-5 if dtype == "float32" else 1e-13)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("descending", [False, True])
def test_equal_values_keep_their_order(descending, mode):
    rng = np.random.default_rng(1)
    x = rng.choice(np.float32([-0.0, 0.0, 1.0, -1.0, np.inf, -np.inf]), size=(4, 200))
    for values in (x, x > 0, (x > 0) * np.int64(2**53) + (x > 1)):
        args = (values.astype("int8") if values.dtype == bool else values,)
        kwargs = {"axis": 1, "descending": descending, "stable": True}
        (found,), (expected,) = of_tensorflow("argsort", args, kwargs, mode=mode), of_strict("argsort", args, kwargs)
        np.testing.assert_array_equal(found, expected)
        (first,) = of_tensorflow("argmax", args, {"axis": 1}, mode=mode)
        np.testing.assert_array_equal(first, np.argmax(args[0], axis=1))


@pytest.mark.parametrize("mode", MODES)
def test_short_integers_are_summed_as_long_ones(mode):
    for name, dtype in (("sum", "int8"), ("sum", "uint8"), ("sum", "int32"), ("cumulative_sum", "int8")):
        x = np.full(100, 100, dtype)
        (found,), (expected,) = of_tensorflow(name, (x,), {}, mode=mode), of_strict(name, (x,), {})
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=max(1, EXAMPLES // 5))
@given(data=st.data())
def test_other_kinds_are_refused_as_the_standard_refuses_them(name, data):
    dtypes, make = CALLS[name]
    for dtype in set(EVERY) - {*dtypes, *(dtype for one, dtype in DIFFERENT if one == name)}:
        args, kwargs = make(data.draw, dtype, SHAPES)
        with pytest.raises(ERRORS):
            of_strict(name, args, kwargs)
        with pytest.raises(ERRORS):
            of_tensorflow(name, args, kwargs, mode="eager")


X, ROWS, MASK = np.zeros((2, 3), "float32"), np.zeros(2, "int64"), np.zeros((2, 3), "bool")


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        *(
            (name, (X,), {"axis": 2})
            for name in ("all", "any", "argmax", "argsort", "max", "mean", "min", "sort", "sum")
        ),
        *((name, (X,), {"axis": -3}) for name in ("count_nonzero", "cumulative_sum")),
        *((name, ([X, X],), {"axis": 5}) for name in ("concat", "stack")),
        *((name, (X, ROWS), {"axis": 2}) for name in ("take", "take_along_axis")),
        *((name, (X, np.zeros((2, 2), "float32")), {}) for name in ("maximum", "minimum", "remainder", "logaddexp")),
        *((name, (X, X.astype("int64")), {}) for name in ("maximum", "minimum", "remainder", "logaddexp")),
        *((name, (X.astype("int64"), 1.5), {}) for name in ("maximum", "minimum", "remainder")),
        ("cumulative_sum", (X,), {}),
        *((name, ([X, MASK],), {}) for name in ("concat", "stack")),
        *((name, ([X, X.T],), {}) for name in ("concat", "stack")),
        ("concat", ([],), {}),
        ("argmax", (X[:0],), {"axis": 0}),
        ("broadcast_to", (X, (2, 4)), {}),
        ("clip", (X, "a"), {}),
        ("full", ((-1,), 0.0), {}),
        ("matrix_transpose", (X[0],), {}),
        ("reshape", (X, (4, 2)), {}),
        ("searchsorted", (X, X[0]), {}),
        ("searchsorted", (X[0], X[0]), {"side": "middle"}),
        ("sum", (X,), {"axis": (0, 0)}),
        ("take", (X, ROWS), {}),
        ("take", (X, ROWS.astype("float32")), {"axis": 0}),
        ("where", (MASK, X, X.astype("int64")), {}),
        ("where", (MASK, X.astype("int64"), 1.5), {}),
        ("where", (MASK[:, :2], X, X), {}),
        ("where", (X, X, X), {}),
        ("zeros", ((2, -1),), {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_calls_are_refused_as_the_standard_refuses_them(name, args, kwargs):
    with pytest.raises(ERRORS):
        of_strict(name, args, kwargs)
    for mode in ("eager", "graph"):
        with pytest.raises(ERRORS):
            of_tensorflow(name, args, kwargs, mode=mode)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_dtypes_have_their_kinds(name):
    dtype = getattr(xp, name)
    assert dtype.name == name
    theirs = strict.float32 if name in BEYOND else getattr(strict, name)
    kinds = ("bool", "signed integer", "unsigned integer", "integral", "real floating", "complex floating", "numeric")
    assert [xp.isdtype(dtype, kind) for kind in kinds] == [strict.isdtype(theirs, kind) for kind in kinds]
    assert xp.isdtype(dtype, dtype)
    assert xp.isdtype(dtype, ("complex floating", dtype))
    assert not xp.isdtype(dtype, ("complex floating", xp.int8 if name == "bool" else xp.bool))
    with pytest.raises(ValueError, match="got 'float'"):
        xp.isdtype(dtype, "float")


@pytest.mark.parametrize("name", FLOATS)
def test_limits_are_the_standards(name):
    mine, theirs = xp.finfo(getattr(xp, name)), strict.finfo(getattr(strict, name))
    for field in ("bits", "eps", "max", "min", "smallest_normal"):
        assert getattr(mine, field) == getattr(theirs, field)
    assert mine.dtype == getattr(xp, name)
    assert all(
        type(x) in (int, float) for x in mine[:-1]
    )  # NumPy scalars would promote the arrays they are combined with


@pytest.mark.parametrize("name", ["int8", "int16", "int32", "int64", "uint8"])
def test_limits_of_integers_are_the_standards(name):
    mine, theirs = xp.iinfo(getattr(xp, name)), strict.iinfo(getattr(strict, name))
    assert tuple(mine[:3]) == (theirs.bits, theirs.max, theirs.min)
    assert mine.dtype == getattr(xp, name)
    assert all(type(x) is int for x in mine[:3])


def test_dtypes_that_are_left_out_are_tensorflows_default_or_64_bits():
    made = [xp.zeros(2), xp.ones(()), xp.full((2,), 1.5), xp.asarray(0.5), xp.asarray([[1.0], [2]]), xp.arange(0.0, 2)]
    assert {x.dtype for x in made} == {xp.float32}
    assert {x.dtype for x in (xp.arange(3), xp.asarray(2), xp.asarray([2**40]), xp.full(2, 1))} == {xp.int64}
    assert {x.dtype for x in (xp.asarray(True), xp.full((), False), xp.asarray([True]))} == {xp.bool}
    assert xp.asarray(np.int32(3)).dtype == xp.int32
    assert int(xp.asarray([2**40 + 5])[0]) == 2**40 + 5


@pytest.mark.parametrize("device", [None, "", "CPU:0"])
def test_a_device_is_one_of_tensorflow(device):
    made = [
        xp.zeros(2, device=device),
        xp.ones(2, device=device),
        xp.full(2, 1, device=device),
        xp.arange(2, device=device),
        xp.asarray(2, device=device),
    ]
    assert all(x.device.endswith("CPU:0") for x in made)
    assert xp.zeros(2, device=made[0].device).device == made[0].device


def test_variables_are_read():
    variable = tf.Variable([[1.0, 2.0]])
    read = [xp.astype(variable, xp.float32, copy=False), xp.asarray(variable), xp.clip(variable), xp.sort(variable)]
    read += [xp.take(variable, xp.asarray([0]), axis=0), xp.reshape(variable, (1, 2))]
    read += [xp.where(variable > 0, variable, 0.0), xp.maximum(variable, 0.0)]
    variable.assign([[5.0, 5.0]])
    for x in read:
        assert isinstance(x, tf.Tensor)
        np.testing.assert_array_equal(x, [[1.0, 2.0]])
