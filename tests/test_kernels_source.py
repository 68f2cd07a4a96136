"""How a CUDA source is read: made whole, fingerprinted, and its kernels' parameters found in the text."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from gpucnn_kernels import source
from gpucnn_kernels.errors import ArgumentError

FLOAT32 = (("SCALAR", "float32"),)


def read(text: str, *definitions: tuple[str, str]) -> source.Source:
    return source.source_from_text(text, "trial", definitions)


def kernel(parameters: str, before: str = "", *definitions: tuple[str, str]) -> source.Kernel:
    text = f'{before}\nextern "C" __global__ void trial({parameters}) {{ }}\n'
    return read(text, *definitions).kernels["trial"]


def refused(text: str, *definitions: tuple[str, str]) -> str:
    with pytest.raises(ArgumentError) as caught:
        _ = read(text, *definitions).kernels
    return str(caught.value)


# ------------------------------------------------------------ the text


def test_a_source_holds_its_headers_once_and_its_definitions_first() -> None:
    text = source.load("activations", (("SCALAR", "float16"), ("SIZE", "7"))).text
    assert text.startswith("#define SCALAR_FLOAT16 1\n#define SIZE 7\n")
    assert '#include "' not in text
    assert text.count("typedef __half scalar_t;") == 1
    assert text.count("#include <cuda_fp16.h>") == 1  # the compiler's own headers stay


def test_the_fingerprint_is_that_of_everything_that_the_compiler_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "FOLDER", tmp_path)
    (tmp_path / "inner.cuh").write_text("#define VALUE 1\n")
    (tmp_path / "outer.cuh").write_text('#include "inner.cuh"\n#define OTHER VALUE')  # no newline at its end
    text = '#include "outer.cuh"\n  #  include "inner.cuh" // again\nextern "C" __global__ void k(int a) { }'
    first = read(text)
    assert first.text.splitlines() == [
        "#define VALUE 1",
        "#define OTHER VALUE",
        'extern "C" __global__ void k(int a) { }',
    ]
    assert read(text).fingerprint == first.fingerprint
    (tmp_path / "inner.cuh").write_text("#define VALUE 2\n")
    assert read(text).fingerprint != first.fingerprint
    assert read(text, ("A", "1")).fingerprint != read(text, ("A", "2")).fingerprint


def test_the_codes_fingerprint_knows_no_comments() -> None:
    text = 'extern "C" __global__ void k(int a) {\n    asm("// %0" : : "r"(a));\n    a = 1;\n}\n'
    first = read(text).code_fingerprint
    commented = "/* head\n   of two lines */\n\n" + text.replace("a = 1;", "a  =  1;  // why")
    assert read(commented).code_fingerprint == first
    assert read(commented).fingerprint != read(text).fingerprint
    for other in (text.replace("a = 1", "a = 2"), text.replace("// %0", "// %1"), "#define B\n" + text):
        assert read(other).code_fingerprint != first


def test_an_include_at_the_very_end_is_found_and_one_in_a_comment_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "FOLDER", tmp_path)
    (tmp_path / "a.cuh").write_text("int a;\n")
    assert read('#include "a.cuh"').text == "int a;\n"
    assert read('// #include "missing.cuh"\nint b;').text == '// #include "missing.cuh"\nint b;'
    with pytest.raises(ArgumentError, match=r'#include "missing\.cuh": there is no such header'):
        read('#include "missing.cuh"\n')


def test_names_that_there_are_not() -> None:
    with pytest.raises(ArgumentError, match=r"no CUDA source 'convulsion'; there are .*activations"):
        source.load("convulsion")
    with pytest.raises(ArgumentError, match=r"arrays of float32, float16, bfloat16, float64, got int8"):
        source.load("activations", (("SCALAR", "int8"),))


def test_the_title_says_which_variant() -> None:
    assert source.load("activations", (*FLOAT32, ("TILE", "8"))).title == "activations (SCALAR float32) (TILE 8)"


# ------------------------------------------------------------ parameters


@pytest.mark.parametrize(
    ("declaration", "dtype", "constant"),
    [
        ("const float *x", "float32", True),
        ("float const* __restrict__ x", "float32", True),
        ("float *x", "float32", False),
        ("float*x", "float32", False),
        ("float *const x", "float32", False),  # the pointer is constant, what it points to is not
        ("const double *__restrict x", "float64", True),
        ("unsigned char *x", "uint8", False),
        ("const unsigned *x", "uint32", True),
        ("unsigned int *x", "uint32", False),
        ("const  long\n  long  *x", "int64", True),
        ("unsigned long long *x", "uint64", False),
        ("bool *x", "bool", False),
        ("int *x", "int32", False),
        ("const __half *x", "float16", True),
        ("__nv_bfloat16 *x", "bfloat16", False),
    ],
)
def test_pointers(declaration: str, dtype: str, constant: bool) -> None:
    (parameter,) = kernel(declaration).parameters
    assert (parameter.name, parameter.dtype, parameter.constant, parameter.value) == ("x", dtype, constant, None)


@pytest.mark.parametrize(
    ("declaration", "value"),
    [
        ("bool v", ctypes.c_bool),
        ("unsigned char v", ctypes.c_uint8),
        ("int v", ctypes.c_int32),
        ("const int v", ctypes.c_int32),
        ("unsigned v", ctypes.c_uint32),
        ("long long v", ctypes.c_int64),
        ("unsigned long long v", ctypes.c_uint64),
        ("float v", ctypes.c_float),
        ("double v", ctypes.c_double),
    ],
)
def test_values(declaration: str, value: type) -> None:
    (parameter,) = kernel(declaration).parameters
    assert (parameter.name, parameter.dtype, parameter.value) == ("v", None, value)


@pytest.mark.parametrize(
    ("scalar", "stored", "computed"),
    [
        ("float32", "float32", ctypes.c_float),
        ("float16", "float16", ctypes.c_float),
        ("bfloat16", "bfloat16", ctypes.c_float),
        ("float64", "float64", ctypes.c_double),
    ],
)
def test_the_scalar_is_what_the_definition_says(scalar: str, stored: str, computed: type) -> None:
    parameters = kernel(
        "const scalar_t *x, accumulate_t *sums, accumulate_t factor", "", ("SCALAR", scalar)
    ).parameters
    assert parameters[0].dtype == stored
    assert parameters[1].dtype == ("float64" if computed is ctypes.c_double else "float32")
    assert parameters[2].value is computed


def test_a_scalar_by_value_or_without_a_definition_is_not_known() -> None:
    assert "'scalar_t', which is not known" in refused('extern "C" __global__ void k(scalar_t v) { }', *FLOAT32)
    assert "'scalar_t', which is not known" in refused('extern "C" __global__ void k(scalar_t *v) { }')


def test_structs() -> None:
    before = """
    struct Size { int height, width; };
    struct /* the image */ Image {
        long  long n,
                  c;  // strides
        float scale; bool flip;
        Size size;
    };
    """
    (parameter,) = kernel("const __grid_constant__ Image image", before).parameters
    structure = parameter.value
    assert structure is not None
    assert issubclass(structure, ctypes.Structure)
    fields = dict(structure._fields_)
    assert list(fields) == ["n", "c", "scale", "flip", "size"]
    assert fields["n"] is fields["c"] is ctypes.c_int64
    assert [name for name, _ in fields["size"]._fields_] == ["height", "width"]
    assert ctypes.sizeof(structure) == 32  # 8 + 8 + 4 + 1 (+ 3) + 8, aligned to 8: as in C


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("float4 value;", "a field of type 'float4', which is not known"),
        ("float values[4];", r"a field 'values[4]'; only plain values are read"),
        ("float *values;", "a field '*values'; only plain values are read"),
        ("int a = 3;", "a field of type 'int a =', which is not known"),
        ("", "has no fields"),
    ],
)
def test_a_struct_that_cannot_be_read_matters_only_to_a_kernel_that_takes_it(body: str, words: str) -> None:
    before = f"struct Odd {{ {body} }};"
    assert kernel("int a", before).name == "trial"
    assert words in refused(f'{before}\nextern "C" __global__ void k(Odd odd) {{ }}')


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ("size_t count", "trial: k: parameter 'count' has the type 'size_t', which is not known"),
        ("const float4 *x", "parameter 'x' points to 'float4', which is not known"),
        ("float **x", "parameter 'x' points to 'float *', which is not known"),
        ("float &x", "the parameter 'float &x' is not understood"),
        ("float x[4]", "the parameter 'float x[4]' is not understood"),
        ("struct Shape shape", "has the type 'struct Shape', which is not known"),
        ("Methods shape", "has the type 'Methods', which is not known"),
        ("int", "parameter 'int' has the type '', which is not known"),
    ],
)
def test_parameters_that_cannot_be_passed(parameters: str, words: str) -> None:
    before = "struct Methods { int a; int twice() { return 2 * a; } };"
    assert words in refused(f'{before}\nextern "C" __global__ void k({parameters}) {{ }}')


def test_a_kernel_without_parameters() -> None:
    assert kernel("").parameters == ()


def test_comments_hide_and_strings_do_not() -> None:
    text = """
    // extern "C" __global__ void in_a_line(int a) { }
    /* extern "C" __global__ void in_a_block(int a) { } */
    extern "C" __global__ void real(/* how many */ int count, // an array:
                                    float *x) { const char *url = "http://x/*"; }
    extern "C" __global__ void after(int a) { }
    """
    kernels = read(text).kernels
    assert list(kernels) == ["real", "after"]
    assert [parameter.name for parameter in kernels["real"].parameters] == ["count", "x"]


# ------------------------------------------------------------ launch bounds


@pytest.mark.parametrize(
    ("bounds", "before", "expected"),
    [
        ("", "", 1024),
        ("__launch_bounds__(128)", "", 128),
        ("__launch_bounds__ ( 256 , 2 )", "", 256),
        ("__launch_bounds__(THREADS)", "#define THREADS 64\n", 64),
        ("__launch_bounds__(THREADS, 4)", "constexpr int THREADS = 96;\n", 96),
        ("__launch_bounds__(THREADS)", "static const int THREADS = 32;\n", 32),
    ],
)
def test_launch_bounds(bounds: str, before: str, expected: int) -> None:
    text = f'{before}extern "C" __global__ void {bounds} k(int a) {{ }}'
    assert read(text).kernels["k"].max_threads == expected


def test_launch_bounds_by_a_definition() -> None:
    text = 'extern "C" __global__ void __launch_bounds__(THREADS) k(int a) { }'
    assert read(text, ("THREADS", "192")).kernels["k"].max_threads == 192


@pytest.mark.parametrize(
    "before",
    ["", "#define THREADS (2 * 32)\n", "#if A\n#define THREADS 32\n#else\n#define THREADS 64\n#endif\n"],
    ids=["nowhere", "an expression", "two values"],
)
def test_launch_bounds_that_cannot_be_read(before: str) -> None:
    text = f'{before}extern "C" __global__ void __launch_bounds__(THREADS) k(int a) {{ }}'
    assert "k: cannot read the launch bounds 'THREADS'; write a number" in refused(text)


@pytest.mark.parametrize(
    "odd",
    [
        'extern "C" __global__ __launch_bounds__(64) void other(int a) { }',
        'extern "C" __global__ void __launch_bounds__(2 * (32)) other(int a) { }',
        'extern "C" __global__ void trial(int a);',  # a declaration
        'extern "C" __global__ void trial(int a) { }',  # twice
        "template <int N> __global__ void other(int a) { }",
    ],
)
def test_a_kernel_that_would_be_missed_is_an_error(odd: str) -> None:
    text = f'extern "C" __global__ void trial(int a) {{ }}\n{odd}\n'
    assert "says __global__ 2 times, but only trial could be read" in refused(text)


def test_a_text_without_a_kernel() -> None:
    assert "trial has no kernel of the form: extern" in refused("int a;")


# ------------------------------------------------------------ all that there are


@pytest.mark.parametrize("name", source.names())
def test_every_source_is_read(name: str) -> None:
    for scalar in source.SCALARS:
        for kernel_name, described in source.load(name, (("SCALAR", scalar),)).kernels.items():
            assert described.name == kernel_name
            assert described.parameters
            assert 32 <= described.max_threads <= 1024


@pytest.mark.parametrize("name", source.names())
def test_no_source_computes_in_double_by_a_literal(name: str) -> None:
    """A literal such as 0.5 is a double: in a float kernel it must be NUMBER(0.5) or 0.5f."""
    import re

    text = source.load(name, FLOAT32).text
    text = re.sub(r'"[^"\n]*"|//[^\n]*|/\*.*?\*/', " ", text, flags=re.DOTALL)
    text = re.sub(r"NUMBER\([^()]*\)", " ", text)
    found = re.findall(r"(?<![\w.])(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.])", text)
    assert found == []
