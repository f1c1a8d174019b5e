// SPDX-License-Identifier: Apache-2.0
#include "server/runtime/regions.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"
#include "server/runtime/file_descriptor.h"
#include "server/runtime/generation.h"

namespace dynsplit {
namespace {

constexpr size_t kMaxNameBytes = 64;
constexpr size_t kMaxKeyBytes = 200;
constexpr size_t kIpcHandleBytes = 64;
constexpr size_t kOwnerBytes = 16;
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

const char* KindName(RegionStore::Kind kind) {
  switch (kind) {
    case RegionStore::Kind::kPosixShm:
      return "posix_shm";
    case RegionStore::Kind::kMemFd:
      return "memfd";
    case RegionStore::Kind::kCudaIpc:
      return "cuda_ipc";
  }
  return "";
}

std::string FieldOf(RegionStore::Kind kind, const char* field) {
  return absl::StrCat(KindName(kind), ".", field);
}

absl::Status CheckLength(const std::string& field, std::string_view bytes, size_t wanted) {
  if (bytes.size() == wanted) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("has ", bytes.size(), " bytes; must have ", wanted));
}

// The kind's fields, by the kind's name in RegisterRegionRequest.
absl::Status CheckObject(const RegionStore::Registration& registration, RegionStore::Kind kind) {
  switch (kind) {
    case RegionStore::Kind::kPosixShm:
      return CheckName("posix_shm.key", registration.shm_key, kMaxKeyBytes);
    case RegionStore::Kind::kMemFd:
      return CheckLength("memfd.token", registration.file_token, PassedFiles::kTokenBytes);
    case RegionStore::Kind::kCudaIpc:
      return CheckLength("cuda_ipc.handle", registration.ipc_handle, kIpcHandleBytes);
  }
  return absl::OkStatus();
}

absl::Status CheckRegistration(const RegionStore::Registration& registration,
                               RegionStore::Kind kind) {
  absl::Status status = CheckName("name", registration.name, kMaxNameBytes);
  if (!status.ok()) return status;
  if (registration.byte_size < 1 || registration.byte_size > kMaxRegionBytes) {
    return InvalidField("byte_size", absl::StrCat("is ", registration.byte_size,
                                                  "; must be in [1, ", kMaxRegionBytes, "]"));
  }
  const std::string offset_field = FieldOf(kind, "offset_bytes");
  if (registration.offset_bytes < 0 || registration.offset_bytes > kMaxRegionBytes) {
    return InvalidField(offset_field, absl::StrCat("is ", registration.offset_bytes,
                                                   "; must be in [0, ", kMaxRegionBytes, "]"));
  }
  const int64_t page_bytes = sysconf(_SC_PAGESIZE);
  if (kind != RegionStore::Kind::kCudaIpc && registration.offset_bytes % page_bytes != 0) {
    return InvalidField(offset_field, absl::StrCat("is ", registration.offset_bytes,
                                                   "; must be a multiple of ", page_bytes));
  }
  return CheckObject(registration, kind);
}

// The lease apart.
bool SameTerms(const RegionStore::Registration& a, const RegionStore::Registration& b) {
  return a.byte_size == b.byte_size && a.writable == b.writable && a.shm_key == b.shm_key &&
         a.file_token == b.file_token && a.ipc_handle == b.ipc_handle &&
         a.device_uuid == b.device_uuid && a.offset_bytes == b.offset_bytes && a.owner == b.owner;
}

absl::StatusOr<FileDescriptor> OpenShm(const std::string& key, bool writable) {
  FileDescriptor file(
      shm_open(absl::StrCat("/", key).c_str(), (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC, 0));
  if (file.valid()) return file;
  if (errno == ENOENT) return NotFound("shared memory object", key);
  return PreconditionFailed("REGION_ACCESS", "posix_shm.key",
                            absl::StrCat("cannot be opened: ", std::strerror(errno)));
}

// That the object is the server's user's and has the bytes.
absl::StatusOr<struct stat> CheckFile(const RegionStore::Registration& registration,
                                      RegionStore::Kind kind, int file) {
  struct stat facts = {};
  if (fstat(file, &facts) != 0) {
    return absl::InternalError(absl::StrCat("fstat: ", std::strerror(errno)));
  }
  if (facts.st_uid != geteuid()) {
    return PreconditionFailed(
        "REGION_OWNER", KindName(kind),
        absl::StrCat("belongs to user ", facts.st_uid, "; the server runs as ", geteuid()));
  }
  if (registration.offset_bytes > facts.st_size ||
      registration.byte_size > facts.st_size - registration.offset_bytes) {
    return InvalidField("byte_size", absl::StrCat("is ", registration.byte_size, " from byte ",
                                                  registration.offset_bytes, " on; the object has ",
                                                  facts.st_size, " bytes"));
  }
  return facts;
}

absl::StatusOr<std::string> RandomOwner() {
  std::string owner(kOwnerBytes, '\0');
  if (getrandom(owner.data(), owner.size(), 0) != static_cast<ssize_t>(owner.size())) {
    return absl::InternalError(absl::StrCat("getrandom: ", std::strerror(errno)));
  }
  return owner;
}

}  // namespace

RegionStore::RegionStore(Options options, std::vector<Backend*> backends)
    : options_(std::move(options)), backends_(std::move(backends)) {}

RegionStore::~RegionStore() = default;

absl::StatusOr<std::string> RegionStore::Attach() {
  if (!enabled()) return Off("memory");
  absl::StatusOr<std::string> owner = RandomOwner();
  if (!owner.ok()) return owner;
  absl::MutexLock lock(&mu_);
  if (std::cmp_greater_equal(owners_.size(), options_.max_owners)) {
    return RetryLater(absl::StatusCode::kResourceExhausted,
                      absl::StrCat("at most ", options_.max_owners, " owners may be attached"),
                      kQuotaRetryAfterMs);
  }
  owners_.insert(*owner);
  return owner;
}

std::vector<std::shared_ptr<const Region>> RegionStore::Detach(const std::string& owner) {
  std::vector<std::shared_ptr<const Region>> dropped;
  absl::MutexLock lock(&mu_);
  owners_.erase(owner);
  for (auto it = entries_.begin(); it != entries_.end();) {
    if (it->second.registration.owner != owner) {
      ++it;
      continue;
    }
    dropped.push_back(std::move(it->second.region));
    it = entries_.erase(it);
  }
  return dropped;
}

RegionStore::Kind RegionStore::KindOf(const Registration& registration) {
  if (!registration.shm_key.empty()) return Kind::kPosixShm;
  return registration.file_token.empty() ? Kind::kCudaIpc : Kind::kMemFd;
}

RegionStore::Info RegionStore::Describe(const Entry& entry, absl::Time now) {
  return {.name = entry.registration.name,
          .generation = entry.generation,
          .kind = KindOf(entry.registration),
          .owned = !entry.registration.owner.empty(),
          .byte_size = entry.registration.byte_size,
          .writable = entry.registration.writable,
          .lease_left = entry.expiry - now,
          .num_users = std::max(0, static_cast<int32_t>(entry.region.use_count()) - 1)};
}

absl::Status RegionStore::CheckAllowed(const Registration& registration) const {
  switch (KindOf(registration)) {
    case Kind::kPosixShm:
      return options_.allow_shm ? absl::OkStatus() : Off("shared memory");
    case Kind::kMemFd:
      if (!options_.allow_shm) return Off("shared memory");
      if (options_.files != nullptr) return absl::OkStatus();
      return WithReason(absl::StatusCode::kUnimplemented, "UNSUPPORTED_MEMORY",
                        "memfd: this server has no side socket to receive descriptors (option "
                        "region-socket); register posix_shm or cuda_ipc");
    case Kind::kCudaIpc:
      return options_.allow_cuda_ipc ? absl::OkStatus() : Off("device memory of other processes");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::optional<RegionStore::Info>> RegionStore::Renew(
    const Registration& registration, const Identity& identity) {
  const absl::Time now = options_.now();
  const auto found = entries_.find(registration.name);
  if (found == entries_.end() || now >= found->second.expiry) return std::nullopt;
  Entry& entry = found->second;
  if (!SameTerms(entry.registration, registration) || entry.identity != identity) {
    return AlreadyExists(kResource, registration.name, "is registered with other contents");
  }
  entry.registration.lease = registration.lease;
  entry.expiry = now + registration.lease;
  return Describe(entry, now);
}

absl::Status RegionStore::CheckRoom(const Registration& registration) const {
  if (!registration.owner.empty() && !owners_.contains(registration.owner)) {
    return NotFound("region owner", "of this token");
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
  return absl::OkStatus();
}

absl::StatusOr<RegionStore::Info> RegionStore::Register(const Registration& registration) {
  const Kind kind = KindOf(registration);
  absl::Status status = CheckAllowed(registration);
  if (status.ok()) status = CheckRegistration(registration, kind);
  if (!status.ok()) return status;
  Entry made;
  made.registration = registration;
  if (kind == Kind::kPosixShm) {  // a key can lead to another object by now; a token cannot
    absl::StatusOr<FileDescriptor> file = OpenShm(registration.shm_key, registration.writable);
    if (!file.ok()) return file.status();
    const absl::StatusOr<struct stat> facts = CheckFile(registration, kind, file->number());
    if (!facts.ok()) return facts.status();
    made.identity = {facts->st_dev, facts->st_ino};
  }
  // Mapping takes as long as the object is large: without the lock. Renewing maps nothing.
  for (bool mapped = false;; mapped = true) {
    {
      absl::MutexLock lock(&mu_);
      absl::StatusOr<std::optional<Info>> renewed = Renew(registration, made.identity);
      if (!renewed.ok()) return renewed.status();
      if (renewed->has_value()) return **std::move(renewed);
      if (status = CheckRoom(registration); !status.ok()) return status;
      if (mapped) {
        const absl::Time now = options_.now();
        made.generation = RandomGeneration();
        made.expiry = now + registration.lease;
        const Info info = Describe(made, now);
        std::swap(entries_[registration.name], made);  // one whose lease is over goes unlocked
        if (kind == Kind::kMemFd) options_.files->Remove(registration.file_token);
        return info;
      }
    }
    absl::StatusOr<std::shared_ptr<const Region>> region = Map(registration);
    if (!region.ok()) return region.status();
    made.region = *std::move(region);
  }
}

absl::StatusOr<std::shared_ptr<const Region>> RegionStore::Map(const Registration& registration) {
  return KindOf(registration) == Kind::kCudaIpc ? MapCuda(registration) : MapHost(registration);
}

absl::StatusOr<std::shared_ptr<const Region>> RegionStore::MapHost(
    const Registration& registration) {
  const Kind kind = KindOf(registration);
  // Devices pin only what could be written to.
  Backend& backend = host_backend();
  const bool writable = registration.writable || backend.info().name != "cpu";
  absl::StatusOr<FileDescriptor> file = kind == Kind::kMemFd
                                            ? options_.files->Find(registration.file_token)
                                            : OpenShm(registration.shm_key, writable);
  if (!file.ok()) return file.status();
  const absl::StatusOr<struct stat> facts = CheckFile(registration, kind, file->number());
  if (!facts.ok()) return facts.status();
  const auto size = static_cast<size_t>(registration.byte_size);
  // An object with a name can still be shortened, and reading it then ends the process: whoever can
  // do that has the server's user id, and could end it anyhow.
  void* mapped = mmap(nullptr, size, writable ? PROT_READ | PROT_WRITE : PROT_READ,
                      MAP_SHARED | MAP_POPULATE, file->number(), registration.offset_bytes);
  if (mapped == MAP_FAILED) {
    if (errno == EPERM || errno == EACCES) {
      return PreconditionFailed("REGION_ACCESS", KindName(kind),
                                "cannot be mapped for writing; it is sealed or read-only");
    }
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
    infos.push_back(Describe(entry, now));
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
