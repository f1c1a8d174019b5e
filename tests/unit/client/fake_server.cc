// SPDX-License-Identifier: Apache-2.0
#include "tests/unit/client/fake_server.h"

#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/server_builder.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/wire/channel.h"
#include "proto/wire/crc32c.h"

namespace dynsplit {
namespace {

grpc::Status Invalid(const std::string& message) {
  return {grpc::StatusCode::INVALID_ARGUMENT, message};
}

// Receives chunks up to the end message.
grpc::Status Receive(FakeCompression::Stream* stream, const v1::Begin& begin,
                     std::map<uint32_t, std::string>& tensors, size_t& largest_chunk) {
  std::map<uint32_t, const v1::TensorDescriptor*> open;
  for (const v1::TensorDescriptor& tensor : begin.tensors()) {
    if (!tensor.has_location()) open[tensor.id()] = &tensor;
  }
  const size_t num_streamed = open.size();
  v1::CompressRequest request;
  while (stream->Read(&request)) {
    if (request.has_end()) {
      if (!open.empty()) return Invalid("tensors are missing");
      return std::cmp_equal(request.end().num_tensors(), num_streamed) ? grpc::Status::OK
                                                                       : Invalid("wrong count");
    }
    const std::string& data = request.data();
    const auto found = open.find(request.tensor());
    if (found == open.end()) return Invalid("unknown tensor");
    std::string& tensor = tensors[request.tensor()];
    if (request.offset() != tensor.size()) return Invalid("gap");
    if (request.crc32c() != wire::Crc32c(data.data(), data.size())) return Invalid("chunk crc");
    tensor += data;
    largest_chunk = std::max(largest_chunk, data.size());
    const bool complete = static_cast<int64_t>(tensor.size()) == found->second->byte_size();
    if (request.last() != complete) return Invalid("wrong last");
    if (!complete) continue;
    if (request.tensor_crc32c() != wire::Crc32c(tensor.data(), tensor.size())) {
      return Invalid("tensor crc");
    }
    open.erase(found);
  }
  return Invalid("no end");
}

void SendTensor(FakeCompression::Stream* stream, uint32_t id, const std::string& bytes,
                size_t chunk_bytes, const FakeFaults& faults) {
  for (size_t at = 0; at < bytes.size(); at += chunk_bytes) {
    v1::CompressResponse chunk;
    chunk.set_tensor(faults.unknown_tensor ? id + 1000 : id);
    chunk.set_offset(faults.skip_bytes && at > 0 ? at + 1 : at);
    chunk.set_data(bytes.substr(at, chunk_bytes));
    chunk.set_crc32c(wire::Crc32c(chunk.data().data(), chunk.data().size()) ^
                     (faults.corrupt_chunk ? 1 : 0));
    chunk.set_last(at + chunk.data().size() == bytes.size());
    if (chunk.last()) {
      chunk.set_tensor_crc32c(wire::Crc32c(bytes.data(), bytes.size()) ^
                              (faults.corrupt_tensor_crc ? 1 : 0));
    }
    stream->Write(chunk);
    if (faults.early_end) return;
  }
}

void SendLayer(FakeCompression::Stream* stream, const v1::TensorDescriptor& key,
               const std::string& bytes, size_t chunk_bytes, const FakeFaults& faults) {
  v1::CompressResponse response;
  v1::LayerResult& layer = *response.mutable_layer();
  layer.mutable_plan()->set_layer(faults.layers_descend ? 100 - key.layer() : key.layer());
  layer.set_num_pages(1);
  v1::TensorDescriptor& pages = *layer.add_tensors();
  pages = key;
  pages.set_kind(v1::TENSOR_KIND_KEY_PAGES);
  pages.set_id(key.id() + 500);
  if (faults.huge_tensor) pages.set_byte_size(int64_t{1} << 39);
  stream->Write(response);
  SendTensor(stream, pages.id(), bytes, chunk_bytes, faults);
}

}  // namespace

grpc::Status FakeCompression::Compress(grpc::ServerContext* context, Stream* stream) {
  FakeFaults faults;
  {
    absl::MutexLock lock(&mu_);
    faults = faults_;
  }
  v1::CompressRequest request;
  if (!stream->Read(&request) || !request.has_begin()) return Invalid("no begin");
  const v1::Begin begin = request.begin();
  if (!faults.refuse_begin.ok()) return faults.refuse_begin;
  while (faults.never_answer && !context->IsCancelled()) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  v1::CompressResponse response;
  response.mutable_accepted()->set_request_id(begin.request_id());
  response.mutable_accepted()->set_max_chunk_bytes(faults.max_chunk_bytes);
  if (!faults.forget_accepted) stream->Write(response);

  std::map<uint32_t, std::string> tensors;
  size_t largest_chunk = 0;
  if (!faults.forget_accepted) {
    const grpc::Status received = Receive(stream, begin, tensors, largest_chunk);
    if (!received.ok()) return received;
  }
  if (!faults.refuse_end.ok()) return faults.refuse_end;
  response.Clear();
  response.mutable_sequence()->set_num_blocks(1);
  stream->Write(response);
  for (const v1::TensorDescriptor& tensor : begin.tensors()) {
    if (tensor.kind() != v1::TENSOR_KIND_KEY) continue;
    SendLayer(stream, tensor, tensors[tensor.id()], static_cast<size_t>(begin.max_chunk_bytes()),
              faults);
  }
  response.Clear();
  response.mutable_end()->set_backend("fake");
  if (!faults.forget_end) stream->Write(response);
  absl::MutexLock lock(&mu_);
  begin_ = begin;
  tensors_ = std::move(tensors);
  largest_chunk_ = largest_chunk;
  return grpc::Status::OK;
}

grpc::Status FakeSessions::Fetch(grpc::ServerContext*, Stream* stream) {
  v1::CompressRequest request;
  if (!stream->Read(&request) || !request.has_begin()) return Invalid("no begin");
  const v1::Begin begin = request.begin();
  const v1::SessionTarget::Resume& resume = begin.target().resume();
  const auto chunk_bytes = static_cast<size_t>(begin.max_chunk_bytes());
  absl::MutexLock lock(&mu_);
  int64_t left = break_after_bytes_;
  const auto broken = [&left] { return left == 0; };
  const grpc::Status lost(grpc::StatusCode::UNAVAILABLE, "connection lost");
  v1::CompressResponse response;
  response.mutable_accepted()->set_max_chunk_bytes(3 << 20);
  stream->Write(response);
  for (int32_t number = resume.layer(); std::cmp_less(number, layers_.size()); ++number) {
    const std::vector<std::string>& tensors = layers_[static_cast<size_t>(number)];
    const bool goes_on = begin.target().has_resume() && number == resume.layer();
    response.Clear();
    v1::LayerResult& layer = *response.mutable_layer();
    layer.mutable_plan()->set_layer(number);
    for (size_t i = 0; i < tensors.size(); ++i) {
      v1::TensorDescriptor& tensor = *layer.add_tensors();
      tensor.set_id(static_cast<uint32_t>(i + 1));
      tensor.set_kind(i == 0 ? v1::TENSOR_KIND_KEY_PAGES : v1::TENSOR_KIND_VALUE_PAGES);
      tensor.set_dtype(v1::DTYPE_INT8);
      tensor.set_byte_size(static_cast<int64_t>(tensors[i].size()));
    }
    if (broken()) return lost;
    stream->Write(response);
    for (size_t i = goes_on ? static_cast<size_t>(resume.tensor_index()) : 0; i < tensors.size();
         ++i) {
      const std::string& bytes = tensors[i];
      const bool here = goes_on && std::cmp_equal(i, resume.tensor_index());
      for (size_t at = here ? static_cast<size_t>(resume.offset()) : 0; at < bytes.size();) {
        if (broken()) return lost;
        v1::CompressResponse chunk;
        chunk.set_tensor(static_cast<uint32_t>(i + 1));
        chunk.set_offset(at);
        chunk.set_data(bytes.substr(
            at, left < 0 ? chunk_bytes : std::min(chunk_bytes, static_cast<size_t>(left))));
        chunk.set_crc32c(wire::Crc32c(chunk.data().data(), chunk.data().size()));
        at += chunk.data().size();
        chunk.set_last(at == bytes.size());
        if (chunk.last()) chunk.set_tensor_crc32c(wire::Crc32c(bytes.data(), bytes.size()));
        stream->Write(chunk);
        sent_bytes_ += static_cast<int64_t>(chunk.data().size());
        if (left > 0) left -= static_cast<int64_t>(chunk.data().size());
      }
    }
  }
  if (left >= 0) return lost;
  response.Clear();
  response.mutable_end()->set_backend("fake");
  stream->Write(response);
  return grpc::Status::OK;
}

FakeServer::FakeServer() {
  grpc::EnableDefaultHealthCheckService(true);
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
  builder.RegisterService(&compression_);
  builder.RegisterService(&sessions_);
  for (const auto& setting : wire::TransportSettings(wire::Locality::kSameHost)) {
    builder.AddChannelArgument(setting.key, setting.value);
  }
  server_ = builder.BuildAndStart();
}

FakeServer::~FakeServer() { server_->Shutdown(std::chrono::system_clock::now()); }

std::string FakeServer::target() const { return absl::StrCat("127.0.0.1:", port_); }

}  // namespace dynsplit
