// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/regions.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"
#include "server/runtime/generation.h"

namespace dynsplit {
namespace {

constexpr size_t kMaxNameBytes = 64;
constexpr size_t kMaxKeyBytes = 200;
constexpr size_t kIpcHandleBytes = 64;
constexpr int64_t kMaxRegionBytes = int64_t{1} << 40;
constexpr int64_t kQuotaRetryAfterMs = 1000;
constexpr const char* kResource = "region";

// No '/', so that no name leaves the directory of shared memory objects.
bool IsName(std::string_view text, size_t most) {
  return !text.empty() && text.size() <= most && std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '.' || c == '-';
  });
}

absl::Status CheckName(const std::string& field, std::string_view name, size_t most) {
  if (IsName(name, most)) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("has ", name.size(), " bytes; must be 1 to ", most,
                                          " characters of [A-Za-z0-9_.-]"));
}

class FileDescriptor {
 public:
  explicit FileDescriptor(int number) : number_(number) {}
  ~FileDescriptor() {
    if (number_ >= 0) close(number_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int number() const { return number_; }

 private:
  const int number_;
};

absl::Status Off(std::string_view what) {
  return WithReason(
      absl::StatusCode::kUnimplemented, "REGIONS_OFF",
      absl::StrCat("this server does not map ", absl::string_view(what.data(), what.size()),
                   " (option regions); send tensors as chunks of the stream instead"));
}

absl::Status Quota(std::string_view what, int64_t most) {
  return RetryLater(absl::StatusCode::kResourceExhausted,
                    absl::StrCat("all regions together may have at most ", most, " ",
                                 absl::string_view(what.data(), what.size())),
                    kQuotaRetryAfterMs);
}

absl::Status CheckRegistration(const RegionStore::Registration& registration) {
  absl::Status status = CheckName("name", registration.name, kMaxNameBytes);
  if (!status.ok()) return status;
  if (registration.byte_size < 1 || registration.byte_size > kMaxRegionBytes) {
    return InvalidField("byte_size", absl::StrCat("is ", registration.byte_size,
                                                  "; must be in [1, ", kMaxRegionBytes, "]"));
  }
  const bool shm = !registration.shm_key.empty();
  const char* offset_field = shm ? "posix_shm.offset_bytes" : "cuda_ipc.offset_bytes";
  if (registration.offset_bytes < 0 || registration.offset_bytes > kMaxRegionBytes) {
    return InvalidField(offset_field, absl::StrCat("is ", registration.offset_bytes,
                                                   "; must be in [0, ", kMaxRegionBytes, "]"));
  }
  if (!shm) {
    if (registration.ipc_handle.size() == kIpcHandleBytes) return absl::OkStatus();
    return InvalidField("cuda_ipc.handle", absl::StrCat("has ", registration.ipc_handle.size(),
                                                        " bytes; must have ", kIpcHandleBytes));
  }
  const int64_t page_bytes = sysconf(_SC_PAGESIZE);
  if (registration.offset_bytes % page_bytes != 0) {
    return InvalidField(offset_field, absl::StrCat("is ", registration.offset_bytes,
                                                   "; must be a multiple of ", page_bytes));
  }
  return CheckName("posix_shm.key", registration.shm_key, kMaxKeyBytes);
}

// The lease apart.
bool SameTerms(const RegionStore::Registration& a, const RegionStore::Registration& b) {
  return a.byte_size == b.byte_size && a.writable == b.writable && a.shm_key == b.shm_key &&
         a.ipc_handle == b.ipc_handle && a.device_uuid == b.device_uuid &&
         a.offset_bytes == b.offset_bytes;
}

// An object and the identity that its name alone does not give: names can be used anew.
struct ShmObject {
  int descriptor = -1;
  std::pair<uint64_t, uint64_t> identity;
};

absl::StatusOr<ShmObject> OpenShm(const RegionStore::Registration& registration, bool writable) {
  const int descriptor =
      shm_open(absl::StrCat("/", registration.shm_key).c_str(), writable ? O_RDWR : O_RDONLY, 0);
  if (descriptor < 0) {
    if (errno == ENOENT) return NotFound("shared memory object", registration.shm_key);
    return PreconditionFailed("REGION_ACCESS", "posix_shm.key",
                              absl::StrCat("cannot be opened: ", std::strerror(errno)));
  }
  ShmObject object{.descriptor = descriptor, .identity = {}};
  struct stat facts = {};
  absl::Status status;
  if (fstat(descriptor, &facts) != 0) {
    status = absl::InternalError(absl::StrCat("fstat: ", std::strerror(errno)));
  } else if (facts.st_uid != geteuid()) {
    status = PreconditionFailed(
        "REGION_OWNER", "posix_shm.key",
        absl::StrCat("belongs to user ", facts.st_uid, "; the server runs as ", geteuid()));
  } else if (registration.offset_bytes > facts.st_size ||
             registration.byte_size > facts.st_size - registration.offset_bytes) {
    status =
        InvalidField("byte_size", absl::StrCat("is ", registration.byte_size, " from byte ",
                                               registration.offset_bytes, " on; the object has ",
                                               facts.st_size, " bytes"));
  }
  if (!status.ok()) {
    close(descriptor);
    return status;
  }
  object.identity = {facts.st_dev, facts.st_ino};
  return object;
}

}  // namespace

RegionStore::RegionStore(Options options, std::vector<Backend*> backends)
    : options_(std::move(options)), backends_(std::move(backends)) {}

RegionStore::~RegionStore() = default;

absl::StatusOr<RegionStore::Info> RegionStore::Register(const Registration& registration) {
  const bool shm = !registration.shm_key.empty();
  if (shm && !options_.allow_shm) return Off("shared memory");
  if (!shm && !options_.allow_cuda_ipc) return Off("device memory of other processes");
  if (absl::Status status = CheckRegistration(registration); !status.ok()) return status;
  const auto describe = [](const Entry& entry, absl::Time now) {
    return Info{.name = entry.registration.name,
                .generation = entry.generation,
                .byte_size = entry.registration.byte_size,
                .writable = entry.registration.writable,
                .lease_left = entry.expiry - now,
                .num_users = 0};
  };
  // Mapping takes as long as the object is large: without the lock. Renewing maps nothing.
  Entry made;
  made.registration = registration;
  for (bool mapped = false;; mapped = true) {
    if (shm && !mapped) {
      absl::StatusOr<Identity> identity = IdentityOf(registration);
      if (!identity.ok()) return identity.status();
      made.identity = *identity;
    }
    {
      absl::MutexLock lock(&mu_);
      const absl::Time now = options_.now();
      const auto found = entries_.find(registration.name);
      if (found != entries_.end() && now < found->second.expiry) {
        Entry& entry = found->second;
        if (!SameTerms(entry.registration, registration) || entry.identity != made.identity) {
          return AlreadyExists(kResource, registration.name, "is registered with other contents");
        }
        entry.registration.lease = registration.lease;
        entry.expiry = now + registration.lease;
        return describe(entry, now);
      }
      int64_t num_bytes = registration.byte_size;
      int32_t num_regions = 1;
      for (const auto& [name, entry] : entries_) {
        if (name == registration.name) continue;
        num_bytes += entry.registration.byte_size;
        ++num_regions;
      }
      if (num_regions > options_.max_regions) return Quota("entries", options_.max_regions);
      if (num_bytes > options_.max_bytes) return Quota("bytes", options_.max_bytes);
      if (mapped) {
        made.generation = RandomGeneration();
        made.expiry = now + registration.lease;
        const Info info = describe(made, now);
        std::swap(entries_[registration.name], made);  // one whose lease is over goes unlocked
        return info;
      }
    }
    absl::StatusOr<std::shared_ptr<const Region>> region =
        shm ? MapShm(registration) : MapCuda(registration);
    if (!region.ok()) return region.status();
    made.region = *std::move(region);
  }
}

absl::StatusOr<RegionStore::Identity> RegionStore::IdentityOf(const Registration& registration) {
  absl::StatusOr<ShmObject> object = OpenShm(registration, registration.writable);
  if (!object.ok()) return object.status();
  const FileDescriptor closer(object->descriptor);
  return object->identity;
}

absl::StatusOr<std::shared_ptr<const Region>> RegionStore::MapShm(
    const Registration& registration) {
  // Devices pin only what could be written to.
  Backend& backend = host_backend();
  const bool writable = registration.writable || backend.info().name != "cpu";
  absl::StatusOr<ShmObject> object = OpenShm(registration, writable);
  if (!object.ok()) return object.status();
  const FileDescriptor closer(object->descriptor);
  const auto size = static_cast<size_t>(registration.byte_size);
  // The object can still be shortened, and reading it then ends the process: whoever can do that
  // has the server's user id, and could end it anyhow.
  void* mapped = mmap(nullptr, size, writable ? PROT_READ | PROT_WRITE : PROT_READ,
                      MAP_SHARED | MAP_POPULATE, object->descriptor, registration.offset_bytes);
  if (mapped == MAP_FAILED) {
    return RetryLater(absl::StatusCode::kResourceExhausted,
                      absl::StrCat("mapping ", size, " bytes: ", std::strerror(errno)),
                      kQuotaRetryAfterMs);
  }
  auto* data = static_cast<std::byte*>(mapped);
  absl::StatusOr<Buffer> registered = backend.RegisterHost(data, registration.byte_size);
  absl::Status status = registered.status();
  if (status.ok() && registered->data() != data) {
    registered->Reset();
    status = WithReason(absl::StatusCode::kUnimplemented, "REGIONS_OFF",
                        "the device has no addresses in common with the host");
  }
  if (!status.ok()) {
    munmap(mapped, size);
    return status;
  }
  auto pinned = std::make_shared<Buffer>(*std::move(registered));
  return std::make_shared<const Region>(Region::Kind::kHost, data, registration.byte_size,
                                        registration.writable, [pinned, mapped, size] {
                                          pinned->Reset();
                                          munmap(mapped, size);
                                        });
}

absl::StatusOr<std::shared_ptr<const Region>> RegionStore::MapCuda(
    const Registration& registration) {
  if (backends_.front()->info().uuid.empty()) {
    return Off("device memory: its backend has no device");
  }
  const auto found = std::find_if(
      backends_.begin(), backends_.end(),
      [&](const Backend* candidate) { return candidate->info().uuid == registration.device_uuid; });
  if (found == backends_.end()) {
    return InvalidField("cuda_ipc.device_uuid", "is not the device of this server");
  }
  Backend* const backend = *found;
  absl::StatusOr<Buffer> imported = backend->ImportHandle(
      registration.ipc_handle, registration.offset_bytes, registration.byte_size);
  if (!imported.ok()) return imported.status();
  auto owner = std::make_shared<Buffer>(*std::move(imported));
  std::byte* data = owner->data();
  return std::make_shared<const Region>(
      Region::Kind::kDevice, data, registration.byte_size, registration.writable,
      [owner] { owner->Reset(); }, backend);
}

Backend& RegionStore::host_backend() const {
  const auto healthy = std::find_if(backends_.begin(), backends_.end(),
                                    [](const Backend* backend) { return backend->Healthy().ok(); });
  return healthy == backends_.end() ? *backends_.front() : **healthy;
}

absl::Status RegionStore::Unregister(std::string_view name, uint64_t generation) {
  if (!enabled()) return Off("memory");
  Entry dropped;  // unmapped without the lock
  absl::MutexLock lock(&mu_);
  const auto found = entries_.find(name);
  if (found == entries_.end() || options_.now() >= found->second.expiry ||
      (generation != 0 && generation != found->second.generation)) {
    return NotFound(kResource, name);
  }
  dropped = std::move(found->second);
  entries_.erase(found);
  return absl::OkStatus();
}

std::vector<RegionStore::Info> RegionStore::List() const {
  std::vector<Info> infos;
  absl::MutexLock lock(&mu_);
  const absl::Time now = options_.now();
  for (const auto& [name, entry] : entries_) {
    if (now >= entry.expiry) continue;
    infos.push_back({.name = name,
                     .generation = entry.generation,
                     .byte_size = entry.registration.byte_size,
                     .writable = entry.registration.writable,
                     .lease_left = entry.expiry - now,
                     .num_users = static_cast<int32_t>(entry.region.use_count()) - 1});
  }
  return infos;
}

absl::StatusOr<RegionPart> RegionStore::Find(std::string_view name, uint64_t generation,
                                             int64_t offset_bytes, int64_t size_bytes,
                                             bool writable, const std::string& field) const {
  if (!enabled()) return Off("memory");
  std::shared_ptr<const Region> region;
  {
    absl::MutexLock lock(&mu_);
    const auto found = entries_.find(name);
    if (found == entries_.end() || options_.now() >= found->second.expiry ||
        generation != found->second.generation) {
      return NotFound(kResource, name);
    }
    region = found->second.region;
  }
  if (offset_bytes < 0 || size_bytes < 0 || offset_bytes > region->size_bytes() ||
      size_bytes > region->size_bytes() - offset_bytes) {
    return InvalidField(field + ".offset_bytes",
                        absl::StrCat("is ", offset_bytes, ", where ", size_bytes,
                                     " bytes begin; the region has ", region->size_bytes()));
  }
  if (writable && !region->writable()) {
    return InvalidField(field + ".name", "is a region that was registered without `writable`");
  }
  std::byte* data = region->data() + offset_bytes;
  return RegionPart{.region = std::move(region), .data = data};
}

void RegionStore::Sweep() {
  std::vector<Entry> dropped;  // unmapped without the lock
  absl::MutexLock lock(&mu_);
  const absl::Time now = options_.now();
  for (auto it = entries_.begin(); it != entries_.end();) {
    if (now < it->second.expiry) {
      ++it;
      continue;
    }
    dropped.push_back(std::move(it->second));
    it = entries_.erase(it);
  }
}

}  // namespace dynsplit
