// SPDX-License-Identifier: Apache-2.0
//
// dynsplit: the command line of the compression service.
#include <CLI/CLI.hpp>

#include "client/cli/commands.h"
#include "client/cli/console.h"
#include "proto/wire/channel.h"

int main(int argc, char** argv) {
  dynsplit::wire::InitProcessMemoryPolicy();
  CLI::App app("Compress key-value caches with a dynsplitd server.", "dynsplit");
  app.require_subcommand(1);
  app.set_version_flag("--version", "0.1.0");
  app.footer("Exit codes: 0 done, 1 failed, 2 wrong usage.");
  int exit_code = dynsplit::cli::kExitOk;
  dynsplit::cli::AddCompress(app, exit_code);
  dynsplit::cli::AddPlan(app, exit_code);
  dynsplit::cli::AddInspect(app, exit_code);
  dynsplit::cli::AddBench(app, exit_code);
  dynsplit::cli::AddServeCheck(app, exit_code);
  dynsplit::cli::AddCalibrate(app, exit_code);
  dynsplit::cli::AddProfile(app, exit_code);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? dynsplit::cli::kExitOk : dynsplit::cli::kExitUsage;
  }
  return exit_code;
}
