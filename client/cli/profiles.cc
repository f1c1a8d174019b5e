// SPDX-License-Identifier: Apache-2.0
#include <iostream>
#include <map>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "client/cli/commands.h"
#include "client/cli/console.h"
#include "client/cli/flags.h"
#include "client/cli/report.h"
#include "client/cli/request.h"
#include "client/cpp/file_io.h"

namespace dynsplit::cli {
namespace {

struct CalibrateFlags {
  ConnectionFlags connection;
  CaptureFlags capture;
  std::string profile, name, output;
  std::vector<int32_t> candidates;
  int32_t future_queries = 0, overlap = 0, min_occurrences = 0, max_occurrences = 0;
  std::optional<double> alpha;
  bool json = false, store = false, replace = false;
};

// Text in a field of a profile's CSV, where commas and line breaks end fields.
std::string EscapeText(const std::string& text) {
  std::string escaped;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '\n') {
      escaped += "\\n";
    } else if (c == '\\') {
      escaped += "\\\\";
    } else if (c == ',' || c == '"' || byte < 0x20 || byte == 0x7F) {
      absl::StrAppendFormat(&escaped, "\\x%02x", byte);
    } else {
      escaped += c;
    }
  }
  return escaped;
}

// The form of the server's profile files.
std::string Csv(const v1::DelimiterProfile& profile) {
  std::string csv;
  if (!profile.description().empty()) {
    csv = absl::StrCat("# ", absl::StrReplaceAll(profile.description(), {{"\n", "\n# "}}), "\n");
  }
  absl::StrAppend(&csv, "token_id,text_escaped,weight,occurrences,sentence_end\n");
  for (const v1::DelimiterWeight& weight : profile.weights()) {
    absl::StrAppendFormat(&csv, "%d,%s,%.6g,%d,%d\n", weight.token_id(), EscapeText(weight.text()),
                          weight.weight(), weight.num_occurrences(), weight.sentence_end() ? 1 : 0);
  }
  return csv;
}

absl::Status WriteFile(const std::string& path, const std::string& text) {
  auto file = AtomicFile::Create(path);
  if (!file.ok()) return file.status();
  if (absl::Status status = (*file)->Write(text.data(), text.size()); !status.ok()) return status;
  return (*file)->Commit();
}

CompressJob MakeCalibrationJob(const Capture& capture, const CalibrateFlags& flags) {
  CompressJob job;
  job.owner = capture.owner;
  *job.begin.mutable_shape() = capture.shape;
  *job.begin.mutable_rope() = capture.rope;
  if (!flags.profile.empty()) {
    job.begin.mutable_policy()->mutable_segmentation()->set_profile(flags.profile);
  }
  v1::CalibrationOptions& options = *job.begin.mutable_calibration();
  options.mutable_candidate_token_ids()->Assign(flags.candidates.begin(), flags.candidates.end());
  options.set_num_future_queries(flags.future_queries);
  options.set_overlap_size(flags.overlap);
  if (flags.alpha.has_value()) options.set_alpha(*flags.alpha);
  options.set_min_occurrences(flags.min_occurrences);
  options.set_max_occurrences(flags.max_occurrences);
  const auto add = [&job](v1::TensorKind kind, std::optional<int32_t> layer, v1::DType dtype,
                          absl::Span<const std::byte> bytes) {
    InputTensor& tensor = job.tensors.emplace_back();
    tensor.kind = kind;
    tensor.layer = layer;
    tensor.dtype = dtype;
    tensor.bytes = bytes;
  };
  const auto integers = [](const std::vector<int32_t>& values) {
    return absl::MakeConstSpan(reinterpret_cast<const std::byte*>(values.data()),
                               values.size() * sizeof(int32_t));
  };
  add(v1::TENSOR_KIND_TOKEN_IDS, {}, v1::DTYPE_INT32, integers(capture.token_ids));
  add(v1::TENSOR_KIND_QUERY_POSITIONS, {}, v1::DTYPE_INT32, integers(capture.query_positions));
  for (size_t i = 0; i < capture.layers.size(); ++i) {
    const auto layer = static_cast<int32_t>(i);
    add(v1::TENSOR_KIND_QUERIES, layer, capture.dtype, capture.layers[i].queries);
    add(v1::TENSOR_KIND_KEY, layer, capture.dtype, capture.layers[i].key);
  }
  return job;
}

// The server knows token ids only: takes the text of each from the capture.
void FillTexts(const Capture& capture, v1::DelimiterProfile& profile) {
  std::map<int32_t, int64_t> first;
  for (size_t t = capture.token_ids.size(); t > 0; --t) {
    first[capture.token_ids[t - 1]] = static_cast<int64_t>(t - 1);
  }
  for (v1::DelimiterWeight& weight : *profile.mutable_weights()) {
    const auto found = first.find(weight.token_id());
    if (weight.text().empty() && found != first.end()) {
      weight.set_text(std::string(capture.token_text(found->second)));
    }
  }
}

int RunCalibrate(const CalibrateFlags& flags) {
  const absl::StatusOr<Capture> capture = LoadInput(flags.capture);
  if (!capture.ok()) return PrintError(capture.status());
  if (capture->query_positions.empty()) {
    return PrintError(absl::InvalidArgumentError("the capture has no queries to calibrate with"));
  }
  const auto client = flags.connection.Connect();
  if (!client.ok()) return PrintError(client.status());
  CompressJob job = MakeCalibrationJob(*capture, flags);
  ProgressBar bar(!flags.json);
  job.on_progress = [&](const Progress& progress) {
    bar.Show(progress, capture->shape.num_layers());
  };
  const absl::StatusOr<CompressResult> result = (*client)->Calibrate(job);
  if (!result.ok()) return PrintError(result.status());
  v1::DelimiterProfile profile = result->end.profile();
  FillTexts(*capture, profile);
  if (!flags.name.empty()) profile.set_name(flags.name);
  if (flags.store) {
    const auto stored = (*client)->PutDelimiterProfile(profile, flags.replace);
    if (!stored.ok()) return PrintError(stored.status());
  }
  if (flags.json) {
    std::cout << ToJson(profile).dump(2) << "\n";
    return kExitOk;
  }
  if (flags.output.empty()) {
    std::cout << Csv(profile);
    return kExitOk;
  }
  if (absl::Status status = WriteFile(flags.output, Csv(profile)); !status.ok()) {
    return PrintError(status);
  }
  std::cout << profile.weights_size() << " delimiters written to " << flags.output << "\n";
  return kExitOk;
}

std::string FirstLine(const std::string& text) { return text.substr(0, text.find('\n')); }

int RunList(const ConnectionFlags& connection, bool as_json) {
  const auto client = connection.Connect();
  if (!client.ok()) return PrintError(client.status());
  const auto response = (*client)->ListDelimiterProfiles();
  if (!response.ok()) return PrintError(response.status());
  if (as_json) {
    std::cout << ToJson(*response).dump(2) << "\n";
    return kExitOk;
  }
  std::string descriptions;
  std::vector<std::vector<std::string>> rows = {{"profile", "delimiters", "kind"}};
  for (const v1::DelimiterProfileInfo& profile : response->profiles()) {
    rows.push_back({profile.name(), HumanCount(profile.num_weights()),
                    absl::StrCat(profile.builtin() ? "built in" : "stored",
                                 profile.is_default() ? ", default" : "")});
    descriptions += absl::StrCat(profile.name(), ": ", FirstLine(profile.description()), "\n");
  }
  std::cout << Table(rows) << "\n" << descriptions;
  return kExitOk;
}

int RunShow(const ConnectionFlags& connection, const std::string& name, bool as_json) {
  const auto client = connection.Connect();
  if (!client.ok()) return PrintError(client.status());
  const auto profile = (*client)->GetDelimiterProfile(name);
  if (!profile.ok()) return PrintError(profile.status());
  std::cout << (as_json ? ToJson(*profile).dump(2) + "\n" : Csv(*profile));
  return kExitOk;
}

}  // namespace

void AddCalibrate(CLI::App& app, int& exit_code) {
  CLI::App& command = *app.add_subcommand(
      "calibrate", "Measure delimiter importance on a capture with all queries");
  auto flags = std::make_shared<CalibrateFlags>();
  flags->capture.AddTo(command);
  flags->connection.AddTo(command);
  command.add_option("-o,--output", flags->output, "CSV file; default: stdout");
  command.add_option("--profile", flags->profile, "Profile whose token ids are measured");
  command.add_option("--candidates", flags->candidates, "Token ids to measure instead: 13,30,...")
      ->delimiter(',');
  command.add_option("--future-queries", flags->future_queries, "Queries behind a delimiter")
      ->check(CLI::Range(1, 64));
  command.add_option("--overlap", flags->overlap, "Retained keys up to the delimiter")
      ->check(CLI::Range(1, 65536));
  command.add_option("--alpha", flags->alpha, "Weight of the dropped mass")
      ->check(CLI::Range(0.0, 16.0));
  command.add_option("--min-occurrences", flags->min_occurrences, "Rarer types keep their weight")
      ->check(CLI::PositiveNumber);
  command.add_option("--max-occurrences", flags->max_occurrences, "Occurrences measured a type")
      ->check(CLI::PositiveNumber);
  CLI::Option* name = command.add_option("--name", flags->name, "Name of the new profile");
  CLI::Option* store = command.add_flag("--store", flags->store, "Store it in the server");
  store->needs(name);
  command.add_flag("--replace", flags->replace, "Replace a stored profile of that name")
      ->needs(store);
  command.add_flag("--json", flags->json, "The profile as JSON on stdout");
  command.callback([flags, &exit_code] { exit_code = RunCalibrate(*flags); });
}

void AddProfile(CLI::App& app, int& exit_code) {
  CLI::App& command = *app.add_subcommand("profile", "Delimiter profiles of the server");
  command.require_subcommand(1);
  struct Flags {
    ConnectionFlags connection;
    std::string name;
    bool json = false;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App& list = *command.add_subcommand("list", "Names and sizes");
  CLI::App& show = *command.add_subcommand("show", "The weights of one, as CSV");
  show.add_option("name", flags->name, "Profile (default: the server's default)");
  for (CLI::App* sub : {&list, &show}) {
    flags->connection.AddTo(*sub);
    sub->add_flag("--json", flags->json, "Machine-readable answer on stdout");
  }
  list.callback([flags, &exit_code] { exit_code = RunList(flags->connection, flags->json); });
  show.callback(
      [flags, &exit_code] { exit_code = RunShow(flags->connection, flags->name, flags->json); });
}

}  // namespace dynsplit::cli
