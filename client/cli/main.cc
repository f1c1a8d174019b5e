// SPDX-License-Identifier: Apache-2.0
//
// dynsplit: the command line of the compression service.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>

#include "client/cli/commands.h"
#include "client/cli/console.h"
#include "proto/wire/channel.h"

namespace dynsplit::cli {
namespace {

int Main(int argc, char** argv) {
  wire::InitProcessMemoryPolicy();
  CLI::App app("Compress key-value caches, or keep them resident, with a dynsplitd server.",
               "dynsplit");
  app.require_subcommand(1);
  app.set_version_flag("--version", "0.1.0");
  app.footer("Exit codes: 0 done, 1 failed, 2 wrong usage.");
  int exit_code = kExitOk;
  AddCompress(app, exit_code);
  AddPlan(app, exit_code);
  AddSession(app, exit_code);
  AddSessions(app, exit_code);
  AddInspect(app, exit_code);
  AddAdvise(app, exit_code);
  AddBench(app, exit_code);
  AddServeCheck(app, exit_code);
  AddCalibrate(app, exit_code);
  AddProfile(app, exit_code);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kExitOk : kExitUsage;
  }
  return exit_code;
}

}  // namespace
}  // namespace dynsplit::cli

int main(int argc, char** argv) {
  try {
    return dynsplit::cli::Main(argc, argv);
  } catch (const std::exception& error) {  // of the libraries; ours throw none
    std::fprintf(stderr, "dynsplit: %s\n", error.what());
    return dynsplit::cli::kExitFailed;
  }
}
