// Importing selfnpo_kernels._cpp registers the ops of csrc/cpu with torch. The module's only
// function names the instruction set that the ops run on.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cpu/ops.h"

static PyObject* capability(PyObject*, PyObject*) { return PyUnicode_FromString(selfnpo::kernels().name); }

static PyMethodDef methods[] = {
    {"capability", capability, METH_NOARGS, "AVX512, AVX2 or DEFAULT: what the kernels chosen for this machine are made for."},
    {nullptr, nullptr, 0, nullptr},
};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpp", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__cpp(void) { return PyModule_Create(&module); }
