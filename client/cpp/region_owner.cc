// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/region_owner.h"

#include "proto/wire/status.h"

namespace dynsplit {

absl::StatusOr<std::unique_ptr<RegionOwner>> RegionOwner::Attach(
    const std::shared_ptr<grpc::Channel>& channel, absl::Duration timeout) {
  std::unique_ptr<RegionOwner> owner(new RegionOwner(channel));
  if (absl::Status status = owner->Start(timeout); !status.ok()) return status;
  return owner;
}

RegionOwner::~RegionOwner() {
  context_.TryCancel();
  absl::MutexLock lock(&mu_);
  mu_.Await(absl::Condition(&done_));
}

absl::Status RegionOwner::Start(absl::Duration timeout) {
  {
    absl::MutexLock lock(&mu_);
    done_ = false;
  }
  stub_->async()->Attach(&context_, this);
  StartRead(&response_);
  StartCall();
  absl::MutexLock lock(&mu_);
  const auto settled = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return answered_ || done_; };
  if (!mu_.AwaitWithTimeout(absl::Condition(&settled), timeout)) {
    return absl::DeadlineExceededError("the server did not answer Attach");
  }
  if (!answered_) return wire::ToAbsl(status_);
  return absl::OkStatus();
}

bool RegionOwner::attached() const {
  absl::MutexLock lock(&mu_);
  return answered_ && !done_;
}

void RegionOwner::OnReadDone(bool ok) {
  if (!ok) return;  // OnDone follows
  {
    absl::MutexLock lock(&mu_);
    if (!answered_) token_ = response_.owner();
    answered_ = true;
  }
  StartRead(&response_);  // shows the end
}

void RegionOwner::OnDone(const grpc::Status& status) {
  absl::MutexLock lock(&mu_);
  status_ = status;
  done_ = true;
}

}  // namespace dynsplit
