"""Opens a persistent object the ordinary way: the source inside the file is executed."""

import types

import dnnlib

_modules = {}


def persistent_class(cls):
    class Persistent(cls):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._init_args, self._init_kwargs = args, kwargs

        @property
        def init_args(self):
            return self._init_args

        @property
        def init_kwargs(self):
            return dnnlib.EasyDict(self._init_kwargs)

        def __reduce__(self):
            meta = {"type": "class", "version": 6, "module_src": self._module_src}
            meta.update(class_name=type(self).__name__, state=dict(self.__dict__))
            return _reconstruct_persistent_obj, (meta,)

    Persistent.__name__ = cls.__name__
    return Persistent


def _reconstruct_persistent_obj(meta):
    meta = dnnlib.EasyDict(meta)
    assert meta.type == "class" and meta.version == 6
    if meta.module_src not in _modules:
        module = types.ModuleType(f"embedded_{len(_modules)}")
        exec(meta.module_src, module.__dict__)
        _modules[meta.module_src] = module
    found = vars(_modules[meta.module_src])[meta.class_name]
    decorated = persistent_class(found)  # the embedded source has decorated it already; loaders do it again
    decorated._module_src = meta.module_src
    obj = decorated.__new__(decorated)
    state = dnnlib.EasyDict(meta.state)
    if callable(getattr(obj, "__setstate__", None)):
        obj.__setstate__(state)
    else:
        obj.__dict__.update(state)
    return obj
