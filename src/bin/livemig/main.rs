//! The `livemig` command: arguments in, library calls, what came of it out.

mod cli;
mod commands;
mod exit;
mod priority;
mod progress;
#[cfg(debug_assertions)]
mod standstill;
mod table;
mod verdict;

use std::process::ExitCode;

use clap::Parser;
use livemig::runtime::wrapper::Role;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    if let Some(role) = Role::of(arguments.next().as_deref()) {
        return role.play(arguments.collect());
    }
    let cli = cli::Cli::parse();
    let is_device = matches!(cli.command, cli::Command::TunnelDevice { .. });
    // The library of the userspace device tells its keys when asked for everything.
    if !is_device {
        log_to_stderr(cli.verbose);
    }
    let mut builder = if is_device {
        // `run_device` says why.
        tokio::runtime::Builder::new_current_thread()
    } else {
        tokio::runtime::Builder::new_multi_thread()
    };
    let runtime = match builder.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("livemig: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let json = cli.json;
    let code = match runtime.block_on(commands::run(cli)) {
        Ok(code) => code,
        Err(error) => {
            progress::complain(&error, json);
            exit::code(&error)
        }
    };
    // A blocking call that was given up must not keep the command from ending.
    runtime.shutdown_background();
    code
}

/// What `-v` shows: livemig's own steps, then also those of the libraries under it.
fn log_to_stderr(verbose: u8) {
    use tracing_subscriber::EnvFilter;
    let filter = match verbose {
        0 => EnvFilter::from_env("LIVEMIG_LOG"),
        1 => EnvFilter::new("livemig=debug"),
        2 => EnvFilter::new("livemig=trace,info"),
        _ => EnvFilter::new("trace,neli=info"),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
}
