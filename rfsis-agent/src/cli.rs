//! The command line, and how the process ends.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::config::ConfigErrors;

/// A virtual IP whose TCP connections outlive the server.
#[derive(Debug, Parser)]
#[command(name = "rfsis-agent", version, about)]
pub struct Cli {
    /// The config file, the same on both nodes.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        default_value = "/etc/rfsis/config.yaml"
    )]
    pub config: PathBuf,
    /// Options of a run in the foreground.
    #[command(flatten)]
    pub run: RunOptions,
    /// What to do instead of running.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// Options of a run in the foreground.
#[derive(Args, Debug)]
pub struct RunOptions {
    /// What the operator prefers this node to be.
    #[arg(long, value_enum, default_value_t = Role::Backup)]
    pub role: Role,
    /// How log lines look.
    #[arg(long, value_enum, default_value_t = LogFormat::Pretty)]
    pub log_format: LogFormat,
}

/// What to do instead of running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Validate the config file.
    Check,
    /// Show what the running agent is doing.
    Status {
        /// Print JSON for a machine.
        #[arg(long)]
        json: bool,
    },
    /// Move the virtual IP to the other node, planned: nothing is lost. Asked on either node.
    Switchover {
        /// Although connections are lost by that: unprotected ones, or all while nothing is confirmed.
        #[arg(long)]
        force: bool,
    },
    /// Remove what a crashed agent left on this host.
    Cleanup,
}

/// What the operator prefers a node to be.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Hash, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Becomes active where nobody else is.
    Primary,
    /// Waits for the primary first.
    Backup,
}

impl Role {
    /// The word used on the command line, in logs and in `status`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Role::Primary => "primary",
            Role::Backup => "backup",
        }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For a person.
    Pretty,
    /// One JSON object a line.
    Json,
}

/// Why the process ends other than well. The message goes to stderr, the code to the caller.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// Failed while running: exit code 1.
    #[error("{0:#}")]
    Failed(anyhow::Error),
    /// The config file is wrong: exit code 2, as for wrong arguments.
    #[error("{0}")]
    BadConfig(#[from] ConfigErrors),
    /// The config file is valid and does not fit this host: exit code 2.
    #[error("{0:#}")]
    Unfit(anyhow::Error),
    /// The kernel refuses for lack of a privilege or a feature; the message has the remedy: exit
    /// code 3.
    #[error("{0:#}")]
    Unable(anyhow::Error),
    /// The host lacks a privilege or a kernel feature: exit code 3.
    #[error("{what}: {remedy}")]
    Missing {
        /// What is missing.
        what: String,
        /// What the operator can do about it.
        remedy: String,
    },
}

impl Fatal {
    /// The exit code of the process.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Fatal::Failed(_) => 1,
            Fatal::BadConfig(_) | Fatal::Unfit(_) => 2,
            Fatal::Unable(_) | Fatal::Missing { .. } => 3,
        }
    }
}

impl From<anyhow::Error> for Fatal {
    fn from(error: anyhow::Error) -> Self {
        Fatal::Failed(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_command_runs_as_backup_with_the_default_config() {
        let cli = Cli::try_parse_from(["rfsis-agent"]).unwrap();
        assert_eq!(cli.config, PathBuf::from("/etc/rfsis/config.yaml"));
        assert_eq!(cli.run.role, Role::Backup);
        assert_eq!(cli.run.log_format, LogFormat::Pretty);
        assert_eq!(cli.command, None);
    }

    #[test]
    fn config_may_stand_before_and_behind_a_subcommand() {
        for line in [
            ["rfsis-agent", "--config", "a.yaml", "check"],
            ["rfsis-agent", "check", "--config", "a.yaml"],
        ] {
            let cli = Cli::try_parse_from(line).unwrap();
            assert_eq!(cli.config, PathBuf::from("a.yaml"));
            assert_eq!(cli.command, Some(Command::Check));
        }
    }

    #[test]
    fn wrong_arguments_exit_with_2() {
        for line in [
            vec!["rfsis-agent", "--role", "master"],
            vec!["rfsis-agent", "statsu"],
            vec!["rfsis-agent", "check", "--role", "primary"],
        ] {
            assert_eq!(Cli::try_parse_from(line).unwrap_err().exit_code(), 2);
        }
    }

    #[test]
    fn exit_codes_tell_failure_config_and_host_apart() {
        let missing = Fatal::Missing {
            what: "CAP_NET_ADMIN".into(),
            remedy: "run as root".into(),
        };
        assert_eq!(missing.to_string(), "CAP_NET_ADMIN: run as root");
        let codes = [
            Fatal::Failed(anyhow::anyhow!("link down")),
            Fatal::BadConfig(ConfigErrors(Vec::new())),
            missing,
        ]
        .map(|fatal| fatal.exit_code());
        assert_eq!(codes, [1, 2, 3]);
    }
}
