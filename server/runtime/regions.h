// SPDX-License-Identifier: Apache-2.0
//
// Memory that clients share with the server on one host: shared memory, by name or as a descriptor
// that was passed, and CUDA allocations of other processes. Mapped (and pinned) once when
// registered, never per request; bounds are checked against the real object. A region is used by
// whoever can name it and its generation, which is random and returned only to who registered it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/pipeline/backend.h"
#include "server/runtime/passed_files.h"

namespace dynsplit {

// Immutable. Unmaps when the last user lets go.
class Region {
 public:
  enum class Kind : uint8_t { kHost, kDevice };

  Region(Kind kind, std::byte* data, int64_t size_bytes, bool writable, std::function<void()> unmap,
         Backend* backend = nullptr)
      : backend_(backend),
        kind_(kind),
        data_(data),
        size_bytes_(size_bytes),
        writable_(writable),
        unmap_(std::move(unmap)) {}
  ~Region() {
    if (unmap_) unmap_();
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  Kind kind() const { return kind_; }
  // The one whose operations may use it; null = all.
  Backend* backend() const { return backend_; }
  // What operations take, wherever it lies; of kHost, the host's own address too.
  std::byte* data() const { return data_; }
  int64_t size_bytes() const { return size_bytes_; }
  bool writable() const { return writable_; }

 private:
  Backend* const backend_;
  const Kind kind_;
  std::byte* const data_;
  const int64_t size_bytes_;
  const bool writable_;
  const std::function<void()> unmap_;
};

// A place in a region, before it is looked up, or for others to look up.
struct RegionName {
  std::string name;
  uint64_t generation = 0;
  int64_t offset_bytes = 0;
};

// A part of a region in use by a request; keeps it mapped.
struct RegionPart {
  std::shared_ptr<const Region> region;
  std::byte* data = nullptr;
};

// Thread-safe.
class RegionStore {
 public:
  struct Options {
    bool allow_shm = false;
    bool allow_cuda_ipc = false;
    int32_t max_regions = 256;
    int64_t max_bytes = int64_t{1} << 40;
    int32_t max_owners = 256;
    PassedFiles* files = nullptr;  // what memfds are taken from; null = none are
    std::function<absl::Time()> now = absl::Now;
  };
  struct Registration {
    std::string name;
    int64_t byte_size = 0;
    bool writable = false;
    absl::Duration lease = absl::Seconds(600);
    std::string shm_key;      // POSIX shared memory, without '/'; or
    std::string file_token;   // a memfd; or
    std::string ipc_handle;   // cudaIpcMemHandle_t
    std::string device_uuid;  // CUDA only
    int64_t offset_bytes = 0;
    std::string owner;  // as Attach returned it; empty = by its lease alone
  };
  enum class Kind : uint8_t { kPosixShm, kMemFd, kCudaIpc };
  struct Info {
    std::string name;
    uint64_t generation = 0;
    Kind kind = Kind::kPosixShm;
    bool owned = false;
    int64_t byte_size = 0;
    bool writable = false;
    absl::Duration lease_left;
    int32_t num_users = 0;
  };

  // `backends` outlive the store; at least one. Host memory is for all of them, device memory for
  // that of its device.
  RegionStore(Options options, std::vector<Backend*> backends);
  ~RegionStore();
  RegionStore(const RegionStore&) = delete;
  RegionStore& operator=(const RegionStore&) = delete;

  // A new owner's token: 16 random bytes. RESOURCE_EXHAUSTED beyond max_owners.
  absl::StatusOr<std::string> Attach();
  // Drops what the owner has: at once for who would look it up, unmapped with the last user.
  // Returns it, as unmapping takes as long as memory is large: let it go where that may take a
  // while.
  std::vector<std::shared_ptr<const Region>> Detach(const std::string& owner);

  // The same object of the same owner under the same name again renews the lease. NOT_FOUND for an
  // owner that is gone. Field paths in errors are those of RegisterRegionRequest.
  absl::StatusOr<Info> Register(const Registration& registration);
  absl::Status Unregister(std::string_view name, uint64_t generation);  // 0 = any
  std::vector<Info> List() const;
  // NOT_FOUND for another generation, too. INVALID_ARGUMENT under `field` for bounds; with
  // `writable`, for regions registered without.
  absl::StatusOr<RegionPart> Find(std::string_view name, uint64_t generation, int64_t offset_bytes,
                                  int64_t size_bytes, bool writable,
                                  const std::string& field) const;
  // Drops regions whose lease is over.
  void Sweep();
  bool enabled() const { return options_.allow_shm || options_.allow_cuda_ipc; }

 private:
  using Identity = std::pair<uint64_t, uint64_t>;  // device and inode of a shared memory object
  struct Entry {
    Registration registration;
    Identity identity;
    uint64_t generation = 0;
    absl::Time expiry;
    std::shared_ptr<const Region> region;
  };
  static Kind KindOf(const Registration& registration);
  static Info Describe(const Entry& entry, absl::Time now);
  absl::Status CheckAllowed(const Registration& registration) const;
  // Renews the entry of that name; nullopt where there is none.
  absl::StatusOr<std::optional<Info>> Renew(const Registration& registration,
                                            const Identity& identity)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Owner and quotas allow one more.
  absl::Status CheckRoom(const Registration& registration) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<std::shared_ptr<const Region>> Map(const Registration& registration);
  absl::StatusOr<std::shared_ptr<const Region>> MapHost(const Registration& registration);
  absl::StatusOr<std::shared_ptr<const Region>> MapCuda(const Registration& registration);
  // One that works, where there is one.
  Backend& host_backend() const;

  const Options options_;
  const std::vector<Backend*> backends_;
  mutable absl::Mutex mu_;
  std::map<std::string, Entry, std::less<>> entries_ ABSL_GUARDED_BY(mu_);
  std::set<std::string> owners_ ABSL_GUARDED_BY(mu_);
};

}  // namespace dynsplit
