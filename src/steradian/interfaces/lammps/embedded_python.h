// Python inside LAMMPS, and what the two say to each other.

#ifndef STERADIAN_EMBEDDED_PYTHON_H
#define STERADIAN_EMBEDDED_PYTHON_H

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <string>

// Written by `steradian lammps build`: STERADIAN_PYTHON_LIBRARY, _HOME, _PATH (Python text) and _VERSION.
#include "steradian_build.h"

// ------------------------------------------------------------------------------------ what C++ and Python say to each other
// The same structures stand in pair.py; STERADIAN_PROTOCOL counts their changes.

#define STERADIAN_PROTOCOL 1
#define STERADIAN_MESSAGE 2048

extern "C" {

struct SteradianStep {
  int64_t num_owned, num_atoms, num_edges, num_processes;
  int64_t wants_virials;       // of atoms
  const int32_t *types;        // [num_atoms]
  const int64_t *tags;         // [num_atoms], for messages
  const double *positions;     // [num_atoms, 3] about the middle of the box
  const int64_t *receivers;    // [num_edges] ascending
  const int64_t *senders;      // [num_edges]
  const int64_t *shifts;       // [num_edges, 3]
  double cell[9];
  int64_t periodic[3];
  double *energies;            // [num_owned], and from here on results [eV, Å]
  double *forces;              // [num_atoms, 3]
  double *virial;              // [9]
  double *virials, *centroid_virials;    // [num_atoms, 9], or null
  char message[STERADIAN_MESSAGE];
};

struct SteradianSetup {
  int64_t protocol;
  void *pair;
  const char *model, *precision;
  int64_t threads, num_types;
  const char *const *elements;    // [num_types], "NULL" for types of other styles
  int64_t periodic[3];
  // LAMMPS' part
  void (*forward)(void *pair, char *rows, int64_t bytes);
  void (*reverse)(void *pair, void *rows, int64_t width, int64_t single);
  void (*sum)(void *pair, void *values, int64_t count, int64_t single);
  // Python's part
  int (*step)(SteradianStep *);
  void (*release)();
  double cutoff;
  double unit;          // eV in the energy unit of LAMMPS, given to Python as "metal" or "real"
  int64_t doubles;      // numbers per atom in the widest exchange
  char summary[STERADIAN_MESSAGE];
  char message[STERADIAN_MESSAGE];
  const char *unit_style;
};

}

namespace {

// ------------------------------------------------------------------------------------------------------- Python in here
// Five functions of Python, taken from this process or from the library of the Python that built the plugin. Nothing is
// linked: where LAMMPS runs inside Python a second interpreter would be its end.

struct Interpreter {
  int (*is_initialized)();
  void (*initialize)(int);
  int (*run)(const char *);
  int (*ensure)();
  void (*release)(int);
  void *(*save_thread)();
  const char *(*version)();

  template <typename Function> static bool find(void *library, const char *name, Function &function)
  {
    function = reinterpret_cast<Function>(dlsym(library, name));
    return function != nullptr;
  }

  bool take(void *library)
  {
    return find(library, "Py_IsInitialized", is_initialized) && find(library, "Py_InitializeEx", initialize) &&
        find(library, "PyRun_SimpleString", run) && find(library, "PyGILState_Ensure", ensure) &&
        find(library, "PyGILState_Release", release) && find(library, "PyEval_SaveThread", save_thread) &&
        find(library, "Py_GetVersion", version);
  }

  // empty, or what is wrong
  std::string start()
  {
    if (!take(RTLD_DEFAULT)) {
      if (!std::strlen(STERADIAN_PYTHON_LIBRARY))
        return "the Python that built this plugin has no shared library, so only LAMMPS inside Python can use it";
      // global: the extension modules of Python's packages look for its symbols
      void *library = dlopen(STERADIAN_PYTHON_LIBRARY, RTLD_NOW | RTLD_GLOBAL);
      if (!library || !take(library))
        return std::string("cannot load Python (") + dlerror() + "): give 'steradian lammps build' again";
    }
    std::string found = version();
    found = found.substr(0, found.find(' '));
    if (found.substr(0, found.rfind('.')) != STERADIAN_PYTHON_VERSION)
      return "this process runs Python " + found + ", the plugin was built by " STERADIAN_PYTHON_VERSION
             ": give 'steradian lammps build' with the Python that runs LAMMPS";
    if (!is_initialized()) {
      const char *before = std::getenv("PYTHONHOME");
      std::string kept = before ? before : "";
      setenv("PYTHONHOME", STERADIAN_PYTHON_HOME, 1);
      initialize(0);    // 0: Python does not take signals away from LAMMPS and MPI
      if (before)
        setenv("PYTHONHOME", kept.c_str(), 1);
      else
        unsetenv("PYTHONHOME");
      save_thread();    // from here on whoever calls Python asks for it
    }
    return "";
  }

  int call(const std::string &code)
  {
    int state = ensure();
    int failed = run(code.c_str());
    release(state);
    return failed;
  }
};

Interpreter interpreter;

}    // namespace

#endif
