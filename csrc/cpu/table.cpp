// Checks a table and its passes before any memory is touched, and keeps passes over the same memory apart.
#include "table.h"

#include <algorithm>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace zo {
namespace {

constexpr int kMostThreads = 1 << 16;
constexpr size_t kMostDirections = std::numeric_limits<int>::max();

[[noreturn]] void refuse(const std::string& name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(name + ": expected " + expected + ", got " + got);
}

template <typename A, typename B>
void at_least(const std::string& name, A low, B value) {
  if (value < B(low)) refuse(name, "at least " + std::to_string(low), std::to_string(value));
}

Span span(const void* p, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  return {begin, begin + uintptr_t(bytes)};
}

// There must be `needed` bytes at p, which has `room`.
void check_memory(const std::string& name, const void* p, int64_t needed, int64_t room, int64_t alignment) {
  if (room < needed) refuse(name, std::to_string(needed) + " bytes", std::to_string(room));
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (!address) refuse(name, "an address", "none");
  if (address % uintptr_t(alignment))
    refuse(name, "an address that is a multiple of " + std::to_string(alignment), std::to_string(address));
  if (uintptr_t(needed) > std::numeric_limits<uintptr_t>::max() - address)
    refuse(name, std::to_string(needed) + " bytes from the address " + std::to_string(address) + " on",
           "an address space that ends before");
}

int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

bool reads_mask(MaskKind mask) { return mask == MaskKind::kBool || mask == MaskKind::kBits; }

int64_t mask_bytes(const Entry& e) {
  if (e.mask == MaskKind::kNone || e.mask == MaskKind::kThreshold) return 0;
  return e.mask == MaskKind::kBool ? e.numel : e.numel / 8 + (e.numel % 8 != 0);
}

void check_entry(const std::string& name, const Given& given) {
  const Entry& e = given.entry;
  if (int(e.dtype) < 0 || e.dtype > DType::kFloat16) refuse(name + ": dtype", "0 to 2", std::to_string(int(e.dtype)));
  if (int(e.mask) < 0 || e.mask > MaskKind::kRecord) refuse(name + ": mask", "0 to 4", std::to_string(int(e.mask)));
  at_least(name + ": numel", 0, e.numel);
  at_least(name + ": offset", 0, e.offset);
  at_least(name + ": group", 0, e.group);
  if (e.offset > std::numeric_limits<int64_t>::max() - e.numel)
    refuse(name + ": offset", "at most 2^63 - 1 - numel", std::to_string(e.offset));
  if (!e.numel) return;
  const int64_t size = element_bytes(e.dtype);
  if (e.numel > std::numeric_limits<int64_t>::max() / size)
    refuse(name + ": numel", "at most 2^63 - 1 bytes", std::to_string(e.numel) + " elements");
  check_memory(name + ": dst", e.dst, e.numel * size, given.room.dst, size);
  check_memory(name + ": src", e.src, e.numel * size, given.room.src, size);
  if (const int64_t needed = mask_bytes(e)) check_memory(name + ": mask", e.mask_data, needed, given.room.mask, 1);
}

// The strides must be those of a dense tensor: no element twice, none outside of its memory.
void check_strides(const std::string& name, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t d = 0; d < shape.size(); ++d)
    if (shape[d] != 1) dims.push_back({strides[d], shape[d]});
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) refuse(name, "a stride of " + std::to_string(expected), std::to_string(stride));
    expected *= size;
  }
}

Layout layout_of(const std::string& name, const Strided& given, int64_t numel, bool in_place) {
  if (given.shape.empty() && given.dst.empty() && given.src.empty()) return {};
  if (given.dst.size() != given.shape.size() || given.src.size() != given.shape.size())
    refuse(name + ": strides", std::to_string(given.shape.size()) + " of dst and of src",
           std::to_string(given.dst.size()) + " and " + std::to_string(given.src.size()));
  int64_t elements = 1;
  for (const int64_t size : given.shape) {
    at_least(name + ": shape", 1, size);
    if (size > numel / elements) refuse(name + ": shape", std::to_string(numel) + " elements", "more");
    elements *= size;
  }
  if (elements != numel) refuse(name + ": shape", std::to_string(numel) + " elements", std::to_string(elements));
  check_strides(name + ": strides of dst", given.shape, given.dst);
  check_strides(name + ": strides of src", given.shape, given.src);
  for (size_t d = 0; in_place && d < given.shape.size(); ++d)
    if (given.shape[d] != 1 && given.src[d] != given.dst[d])
      refuse(name + ": strides of src", "those of dst, in place", "others");
  Layout dims;
  for (size_t d = given.shape.size(); d-- > 0;) {
    const Dim dim = {given.shape[d], given.dst[d], given.src[d]};
    if (dim.size == 1) continue;
    if (!dims.empty() && dim.dst == dims.back().dst * dims.back().size && dim.src == dims.back().src * dims.back().size)
      dims.back().size *= dim.size;
    else
      dims.push_back(dim);
  }
  return dims;
}

// A span, and the entry that it belongs to, for errors.
struct Owned {
  Span span;
  size_t entry;
  bool operator<(const Owned& other) const { return span.begin < other.span.begin; }
};

void refuse_overlap(size_t entry, const char* does, const Owned& other) {
  refuse("entries[" + std::to_string(entry) + "]", "memory of its own",
         std::string("some that it ") + does + " and entries[" + std::to_string(other.entry) + "] writes");
}

// Merges sorted spans that touch or overlap.
std::vector<Span> merged(const std::vector<Owned>& spans) {
  std::vector<Span> out;
  for (const Owned& each : spans) {
    if (!out.empty() && each.span.begin <= out.back().end)
      out.back().end = std::max(out.back().end, each.span.end);
    else
      out.push_back(each.span);
  }
  return out;
}

bool overlap(const std::vector<Span>& a, const std::vector<Span>& b) {
  for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    if (a[i].begin < b[j].end && b[j].begin < a[i].end) return true;
    a[i].end <= b[j].end ? ++i : ++j;
  }
  return false;
}

// The tables whose passes are running, in any thread.
struct Passes {
  std::mutex mutex;
  std::vector<const Table*> tables;
};

// Never destroyed: a thread may still be in a pass while the process ends.
Passes& passes() {
  static Passes& made = *[] {
    auto* fresh = new Passes;
#if !defined(_WIN32)
    // A forked child has none of the threads whose passes are running, and none that would unlock the mutex.
    pthread_atfork([] { passes().mutex.lock(); }, [] { passes().mutex.unlock(); },
                   [] {
                     passes().tables.clear();
                     passes().mutex.unlock();
                   });
#endif
    return fresh;
  }();
  return made;
}

}  // namespace

Table::Table(const std::vector<Given>& given) {
  std::vector<Owned> written, read;
  entries_.reserve(given.size());
  layouts_.reserve(given.size());
  for (size_t i = 0; i < given.size(); ++i) {
    const std::string name = "entries[" + std::to_string(i) + "]";
    check_entry(name, given[i]);
    const Entry& e = given[i].entry;
    entries_.push_back(e);
    layouts_.push_back(layout_of(name, given[i].strided, e.numel, e.src == e.dst));
    groups_ = std::max(groups_, size_t(e.group) + 1);
    if (!e.numel) continue;
    const int64_t bytes = e.numel * element_bytes(e.dtype);
    written.push_back({span(e.dst, bytes), i});
    if (e.src != e.dst) read.push_back({span(e.src, bytes), i});
    if (e.mask == MaskKind::kRecord) written.push_back({span(e.mask_data, mask_bytes(e)), i});
    if (reads_mask(e.mask)) read.push_back({span(e.mask_data, mask_bytes(e)), i});
  }
  std::sort(written.begin(), written.end());
  std::sort(read.begin(), read.end());
  for (size_t i = 1; i < written.size(); ++i)
    if (written[i].span.begin < written[i - 1].span.end) refuse_overlap(written[i].entry, "writes", written[i - 1]);
  for (const Owned& each : read) {
    auto after = std::lower_bound(written.begin(), written.end(), Owned{{each.span.end, 0}, 0});
    if (after != written.begin() && each.span.begin < (--after)->span.end) refuse_overlap(each.entry, "reads", *after);
  }
  written_ = merged(written);
  read_ = merged(read);
}

void Table::check(size_t seeds, size_t scales, size_t decays, const std::vector<int64_t>* active, int threads) const {
  at_least("seeds", 1, seeds);
  if (seeds > kMostDirections) refuse("seeds", "at most " + std::to_string(kMostDirections), std::to_string(seeds));
  if (decays < groups_)
    refuse("decays", "one for each of the table's " + std::to_string(groups_) + " groups", std::to_string(decays));
  if (scales % seeds || scales / seeds != decays)
    refuse("scales",
           std::to_string(decays) + " rows of " + std::to_string(seeds) + " numbers, as there are decays and seeds",
           std::to_string(scales) + " numbers");
  if (threads < 1 || threads > kMostThreads)
    refuse("threads", "1 to " + std::to_string(kMostThreads), std::to_string(threads));
  if (!active) return;
  std::vector<bool> seen(entries_.size());
  for (const int64_t i : *active) {
    if (i < 0 || size_t(i) >= seen.size())
      refuse("active", "indices of the table's " + std::to_string(seen.size()) + " entries", std::to_string(i));
    if (seen[size_t(i)]) refuse("active", "each entry once", std::to_string(i) + " twice");
    seen[size_t(i)] = true;
  }
}

UnderWay::UnderWay(const Table& table) : table_(table) {
  Passes& all = passes();
  const std::lock_guard<std::mutex> lock(all.mutex);
  for (const Table* other : all.tables)
    if (overlap(table.written_, other->written_) || overlap(table.written_, other->read_) ||
        overlap(table.read_, other->written_))
      throw std::runtime_error(
          "a pass in another thread works on the same memory: expected one pass at a time over a tensor; nothing was "
          "changed by this one");
  all.tables.push_back(&table);
}

UnderWay::~UnderWay() {
  Passes& all = passes();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto own = std::find(all.tables.begin(), all.tables.end(), &table_);
  if (own != all.tables.end()) all.tables.erase(own);  // a child that was forked meanwhile has an empty list
}

}  // namespace zo
