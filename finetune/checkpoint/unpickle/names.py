"""Names for which a whole file is refused, and unknown names that are ignored.

Safety does not rest on these lists: nothing in a file is imported or called, whatever its name. They decide
what the message says, and what a file still opens with.
"""

from __future__ import annotations

import re

from finetune.checkpoint.unpickle.values import Global

# Modules whose functions run code or commands, or open files and connections.
ACTING = frozenset(
    """
    os posix nt posixpath ntpath subprocess _posixsubprocess commands popen2 pty sys builtins
    __builtin__ importlib imp zipimport pkgutil runpy code codeop ctypes _ctypes cffi shutil tempfile
    glob socket _socket ssl select asyncio multiprocessing threading _thread signal pickle _pickle
    cPickle marshal shelve dbm operator _operator functools _functools copyreg copy_reg codecs _codecs
    io _io inspect gc site pip setuptools distutils timeit trace pdb bdb cProfile profile pydoc doctest
    webbrowser urllib http ftplib smtplib telnetlib xmlrpc platform joblib cloudpickle requests
    """.split()
)
ACTING_NAMES = re.compile(
    r"torch\.(load|save|storage|serialization\.(load|save)|(jit|hub|ops|package|_dynamo|_inductor)(\..*)?"
    r"|utils\.cpp_extension\..*)"
    r"|torch_utils\.(persistence|custom_ops)\..*"
    r"|numpy\.(load|loads|loadtxt|genfromtxt|fromfile|fromregex|memmap|save\w*|(lib|f2py|distutils|testing"
    r"|ctypeslib)\..*|_?core\.(_multiarray_umath|memmap)\..*|_?core\.multiarray\.fromfile)"
    r"|types\.(FunctionType|CodeType|LambdaType|ModuleType)"
)
DATA_TYPES = frozenset(
    f"builtins.{name}"
    for name in """
    bool bytearray bytes complex dict float frozenset int list object range set slice str tuple long unicode
    xrange
    """.split()
) | {"_io.BytesIO", "_io.StringIO"}
# Unknown names that do not affect a network.
HARMLESS = re.compile(
    r"builtins\.\w+|(collections|datetime|numpy\.random|zoneinfo)\..*|random\.Random|types\.SimpleNamespace"
    r"|numpy\.(dtypes\.)?(bool|int|uint|float|str|bytes|datetime|timedelta)\w*"
    r"|torch\.(u?int\d+|b?float\d*|bfloat16|half|double|long|short|bool|dtype|strided|\w+_format|channels_last\w*)"
    r"|torch\.(serialization\._get_layout|Generator|_C\.Generator)"
)


def acts(name: Global) -> bool:
    """Return whether a global can run code or access files: the whole file is refused for it."""
    if name.name in DATA_TYPES:
        return False
    is_hidden = "." in name.attribute or re.fullmatch(r"__.*__", name.attribute) is not None
    is_acting = name.module.partition(".")[0].strip() in ACTING
    return is_hidden or is_acting or ACTING_NAMES.fullmatch(name.name) is not None


def is_harmless(name: str) -> bool:
    """Return whether an unknown name may stand in a network without being needed by it."""
    return HARMLESS.fullmatch(name) is not None
