// SPDX-License-Identifier: Apache-2.0
#include "client/cli/flags.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace dynsplit::cli {
namespace {

template <typename Number>
CLI::Option* AddNumber(CLI::App& app, const std::string& name, const std::string& description,
                       std::function<void(Number)> set) {
  return app.add_option_function<Number>(name, std::move(set), description)->group("Policy");
}

void AddSegmentation(CLI::App& app, v1::Segmentation& segmentation) {
  AddEnum<v1::Segmentation::Method>(
      app, "--segmentation", "Where to cut the text",
      [&segmentation](v1::Segmentation::Method method) { segmentation.set_method(method); });
  AddNumber<int32_t>(app, "--block-size", "Base block size, tokens",
                     [&segmentation](int32_t size) { segmentation.set_block_size(size); });
  AddNumber<int32_t>(app, "--max-deviation", "Dynamic: largest deviation, tokens",
                     [&segmentation](int32_t size) { segmentation.set_max_deviation(size); });
  AddNumber<double>(app, "--balance", "Dynamic: delimiter importance against size, 0 to 1",
                    [&segmentation](double balance) { segmentation.set_balance(balance); });
  AddNumber<std::string>(
      app, "--profile", "Delimiter profile",
      [&segmentation](const std::string& name) { segmentation.set_profile(name); });
}

void AddScoring(CLI::App& app, v1::Scoring& scoring) {
  AddEnum<v1::Scoring::Method>(
      app, "--scoring", "What makes a token worth keeping",
      [&scoring](v1::Scoring::Method method) { scoring.set_method(method); });
  AddNumber<int32_t>(app, "--pooling-kernel", "Smoothing over tokens, odd; 1 = none",
                     [&scoring](int32_t width) { scoring.set_pooling_kernel(width); });
  AddEnum<v1::Scoring::Pooling>(
      app, "--pooling", "How to smooth",
      [&scoring](v1::Scoring::Pooling pooling) { scoring.set_pooling(pooling); });
  AddEnum<v1::Scoring::BlockReduction>(app, "--block-reduction", "Token scores to block score",
                                       [&scoring](v1::Scoring::BlockReduction reduction) {
                                         scoring.set_block_reduction(reduction);
                                       });
  AddEnum<v1::Scoring::QueryReduction>(app, "--query-reduction",
                                       "Attention of the window's queries to token score",
                                       [&scoring](v1::Scoring::QueryReduction reduction) {
                                         scoring.set_query_reduction(reduction);
                                       });
  AddNumber<double>(app, "--softmax-scale", "Multiplies q.k; default 1/sqrt(head_dim)",
                    [&scoring](double scale) { scoring.set_softmax_scale(scale); });
  AddNumber<int32_t>(app, "--refinement-factor",
                     "Sessions: candidates by blocks for every token chosen; 1 = blocks decide",
                     [&scoring](int32_t factor) { scoring.set_refinement_factor(factor); });
}

void AddBudget(CLI::App& app, v1::Budget& budget) {
  auto* target = app.add_option_group("Target", "How much to keep (one of)");
  target->require_option(0, 1);
  target->add_option_function<double>(
      "--ratio", [&budget](double ratio) { budget.set_kept_ratio(ratio); },
      "Share of the tokens, (0, 1]");
  target->add_option_function<int64_t>(
      "--tokens", [&budget](int64_t tokens) { budget.set_tokens_per_head(tokens); },
      "Tokens a head");
  target
      ->add_option_function<uint64_t>(
          "--bytes", [&budget](uint64_t bytes) { budget.set_bytes(static_cast<int64_t>(bytes)); },
          "Bytes of all output (units: KiB, MiB, GiB)")
      ->transform(CLI::AsSizeValue(false));
  AddEnum<v1::Budget::Method>(app, "--budget", "How layers and heads share the target",
                              [&budget](v1::Budget::Method method) { budget.set_method(method); });
  app.add_flag_function(
         "--whole-blocks,!--no-whole-blocks",
         [&budget](int64_t count) { budget.set_whole_blocks(count > 0); },
         "Target counts whole blocks")
      ->group("Policy");
}

void AddEncoding(CLI::App& app, v1::Encoding& encoding) {
  AddEnum<v1::Encoding::Format>(
      app, "--key-encoding", "Bits of the keys",
      [&encoding](v1::Encoding::Format format) { encoding.set_key(format); });
  AddEnum<v1::Encoding::Format>(
      app, "--value-encoding", "Bits of the values",
      [&encoding](v1::Encoding::Format format) { encoding.set_value(format); });
  AddEnum<v1::Encoding::Format>(app, "--encoding", "Bits of both",
                                [&encoding](v1::Encoding::Format format) {
                                  encoding.set_key(format);
                                  encoding.set_value(format);
                                });
  AddEnum<v1::ScaleGranularity>(
      app, "--scale-granularity", "One scale per what",
      [&encoding](v1::ScaleGranularity of) { encoding.set_scale_granularity(of); });
}

// "BEGIN:END"
void AddSpan(const std::string& text, v1::Protection& protection) {
  const std::vector<std::string> ends = absl::StrSplit(text, ':');
  int32_t begin = 0;
  int32_t end = 0;
  if (ends.size() != 2 || !absl::SimpleAtoi(ends[0], &begin) || !absl::SimpleAtoi(ends[1], &end)) {
    throw CLI::ValidationError("--pin", absl::StrCat("'", text, "' is not BEGIN:END"));
  }
  v1::TokenSpan& span = *protection.add_pinned();
  span.set_begin(begin);
  span.set_end(end);
}

void AddProtection(CLI::App& app, v1::Protection& protection) {
  AddNumber<int32_t>(app, "--sinks", "First tokens kept in any case; default 4",
                     [&protection](int32_t num) { protection.set_num_sink_tokens(num); });
  AddNumber<int32_t>(app, "--recent", "Last tokens kept in any case; default 32",
                     [&protection](int32_t num) { protection.set_num_recent_tokens(num); });
  app.add_option_function<std::vector<std::string>>(
         "--pin",
         [&protection](const std::vector<std::string>& spans) {
           for (const std::string& span : spans) AddSpan(span, protection);
         },
         "Tokens BEGIN:END kept in any case, END not included; repeatable")
      ->group("Policy");
  app.add_option_function<std::vector<int32_t>>(
         "--dense-layers",
         [&protection](const std::vector<int32_t>& layers) {
           protection.mutable_dense_layers()->Assign(layers.begin(), layers.end());
         },
         "Layers returned whole: 0,1")
      ->delimiter(',')
      ->group("Policy");
}

void AddQualityFloor(CLI::App& app, v1::QualityFloor& floor) {
  AddNumber<double>(app, "--min-mass", "Quality floor: smallest retained attention mass",
                    [&floor](double mass) { floor.set_min_retained_attention_mass(mass); });
  AddNumber<double>(app, "--max-error", "Quality floor: largest relative error of outputs",
                    [&floor](double error) { floor.set_max_output_relative_error(error); });
  AddNumber<double>(app, "--max-divergence",
                    "Quality floor: largest expected divergence, nats a token",
                    [&floor](double nats) { floor.set_max_expected_divergence(nats); });
  AddNumber<double>(app, "--max-kept-ratio", "Refuse rather than keep more than this share",
                    [&floor](double ratio) { floor.set_max_kept_ratio(ratio); });
}

}  // namespace

void ConnectionFlags::AddTo(CLI::App& app) {
  constexpr char kGroup[] = "Connection";
  app.add_option("--target", target, "Server: host:port or unix:/path")
      ->envname("DYNSPLIT_TARGET")
      ->capture_default_str()
      ->group(kGroup);
  app.add_option("--timeout", timeout_seconds, "Longest duration of a request, seconds")
      ->check(CLI::PositiveNumber)
      ->capture_default_str()
      ->group(kGroup);
  app.add_option("--chunk-kib", chunk_kib, "Size of a chunk, KiB")
      ->check(CLI::Range(4, 3072))
      ->capture_default_str()
      ->group(kGroup);
  app.add_option("--streams,--channels", num_channels,
                 "Connections, and streams of one large request; 4 pay across hosts")
      ->check(CLI::Range(1, 64))
      ->capture_default_str()
      ->group(kGroup);
}

absl::StatusOr<std::unique_ptr<Client>> ConnectionFlags::Connect() const {
  ClientOptions options;
  options.timeout = absl::Seconds(timeout_seconds);
  options.chunk_bytes = static_cast<size_t>(chunk_kib) << 10;
  options.num_channels = num_channels;
  return Client::Connect(target, options);
}

void PolicyFlags::AddTo(CLI::App& app) {
  app.add_option_function<std::string>(
         "--preset", [this](const std::string& name) { policy_.set_preset(name); },
         "Named policy (default: dynsplit; of sessions dynsplit_index)")
      ->group("Policy");
  AddSegmentation(app, *policy_.mutable_segmentation());
  AddScoring(app, *policy_.mutable_scoring());
  AddBudget(app, *policy_.mutable_budget());
  AddEnum<v1::Transform>(app, "--transform", "What happens to tokens that are not chosen",
                         [this](v1::Transform transform) { policy_.set_transform(transform); });
  AddEncoding(app, *policy_.mutable_encoding());
  AddProtection(app, *policy_.mutable_protection());
  AddEnum<v1::Scope>(app, "--scope", "What shares one kept set",
                     [this](v1::Scope scope) { policy_.set_scope(scope); });
  AddEnum<v1::Positions>(app, "--positions", "Positions that output keys carry",
                         [this](v1::Positions positions) { policy_.set_positions(positions); });
  AddQualityFloor(app, *policy_.mutable_quality_floor());
  app.add_flag_function(
         "--allow-fallback", [this](int64_t) { policy_.set_allow_fallback(true); },
         "Use the preset's fallback where evidence is missing")
      ->group("Policy");
  app.add_option_function<int32_t>(
         "--page-size", [this](int32_t size) { policy_.set_page_size(size); },
         "Slots in an output page")
      ->check(CLI::IsMember({16, 32, 64, 128}))
      ->group("Policy");
}

v1::Policy PolicyFlags::Get() const {
  v1::Policy given = policy_;
  const google::protobuf::Reflection& reflection = *given.GetReflection();
  std::vector<const google::protobuf::FieldDescriptor*> fields;
  reflection.ListFields(given, &fields);
  for (const google::protobuf::FieldDescriptor* field : fields) {
    if (field->cpp_type() == google::protobuf::FieldDescriptor::CPPTYPE_MESSAGE &&
        reflection.GetMessage(given, field).ByteSizeLong() == 0) {
      reflection.ClearField(&given, field);
    }
  }
  return given;
}

void CaptureFlags::AddInputTo(CLI::App& app) {
  app.add_option("input", input, "Capture (.safetensors, kv-capture/1)")
      ->required()
      ->check(CLI::ExistingFile);
  app.add_option("--layers", layers, "Layers of the capture to send: 0,2 (default: all)")
      ->delimiter(',');
}

void CaptureFlags::AddTo(CLI::App& app) {
  AddInputTo(app);
  app.add_option("--window", num_window_queries,
                 "Window queries to send; default: those captured, 0 to 1024")
      ->check(CLI::Range(1, 1024));
}

}  // namespace dynsplit::cli
