//! `rfsis-agent`: see the crate's library.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use rfsis_agent::cli::{Cli, Command, Fatal, LogFormat};
use rfsis_agent::control::{self, Request, Response, Status};
use rfsis_agent::{agent, config};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_logs(cli.run.log_format);
    match dispatch(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fatal) => {
            eprintln!("{fatal}");
            ExitCode::from(fatal.exit_code())
        }
    }
}

fn dispatch(cli: &Cli) -> Result<(), Fatal> {
    let config = config::load(&cli.config)?;
    match cli.command {
        None => agent::run(config, cli.run.role),
        Some(Command::Cleanup) => agent::cleanup(&config),
        Some(Command::Check) => print(&format!("{}: ok ({config})", cli.config.display())),
        Some(Command::Status { json }) => {
            match control::ask(&config.control, Request::Status).map_err(anyhow::Error::from)? {
                Response::Status(status) => print(&shown(&status, json)?),
                other => Err(unexpected(&other)),
            }
        }
        Some(Command::Switchover { force }) => {
            let request = Request::Switchover { force };
            match control::ask(&config.control, request).map_err(anyhow::Error::from)? {
                Response::Done => Ok(()),
                other => Err(unexpected(&other)),
            }
        }
    }
}

fn shown(status: &Status, json: bool) -> Result<String, Fatal> {
    if json {
        serde_json::to_string(status).map_err(|error| Fatal::Failed(error.into()))
    } else {
        Ok(status.to_string())
    }
}

fn unexpected(response: &Response) -> Fatal {
    Fatal::Failed(match response {
        Response::Refused { reason } => anyhow::anyhow!("{reason}"),
        other => anyhow::anyhow!("the agent answered something else than was asked: {other:?}"),
    })
}

/// A reader that went away (`status | head -1`) is no failure of ours to panic about.
fn print(text: &str) -> Result<(), Fatal> {
    writeln!(std::io::stdout(), "{text}").map_err(|error| Fatal::Failed(error.into()))
}

/// Logs go to stderr. `RUST_LOG` decides what is shown, `info` where it is unset or unreadable.
fn start_logs(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Json => logs.json().init(),
        LogFormat::Pretty => logs.with_ansi(std::io::stderr().is_terminal()).init(),
    }
}
