//! `cargo xtask`: everything a developer or CI runs. On a fresh Debian each command sets up first.

mod ebpf;
mod fuzz;
mod kernel;
mod run;
mod setup;
mod shell;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Set up, build, show, test and measure RFSIS"
)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what building and testing need; says each step, does nothing twice
    Setup,
    /// Build the eBPF object and the agent (release)
    Build,
    /// Two nodes and a client in namespaces: watch a netcat session survive its server
    Demo,
    /// Run all tests, the root part included
    Test {
        /// Only tests whose name contains this
        filter: Option<String>,
        /// On Debian's kernel of this series (5.10, 6.1, 6.12), in a virtual machine: the tests that
        /// depend on the kernel most, or those that fit the filter
        #[arg(long, value_name = "SERIES")]
        kernel: Option<String>,
    },
    /// What hosts and LANs do to a failover, the runs of minutes included: starved cores, floods, crowds
    Stress {
        /// Only those whose name contains this
        filter: Option<String>,
    },
    /// Run seeds of the simulation; `cargo xtask sim -- --help` has the rest
    Sim {
        /// --seeds N, --first S, --jobs J, --seed S, --keep 1,2, --clients 0, --minimise, --fault NAME, --faults N
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Fuzz what takes input from the network or an operator; what is found stays in fuzz/corpus
    Fuzz {
        /// Only this target: config, frame, heartbeat, lockstep, sync
        target: Option<String>,
        /// Seconds for each target
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
    /// Check formatting and run clippy on everything, warnings being errors
    Lint,
    /// What CI runs: plain build, lint, test, the kernel's part again on Debian's 6.1, a little fuzzing
    Ci,
    /// Measure and print tables
    Bench {
        /// Runs per figure
        #[arg(long, default_value_t = 20)]
        runs: u32,
        /// Few runs: 3 per figure
        #[arg(long, conflicts_with = "runs")]
        quick: bool,
        /// Only this subject: blackout, takeover, upload, idle, capped, uncapped, requests, connections
        #[arg(long, value_name = "NAME")]
        only: Option<String>,
    },
}

fn main() -> std::process::ExitCode {
    let outcome = match Arguments::parse().task {
        Task::Setup => setup::setup().map(drop),
        Task::Build => run::build(),
        Task::Demo => run::demo(),
        Task::Test {
            filter,
            kernel: Some(series),
        } => kernel::test(&series, filter.as_deref()),
        Task::Test { filter, .. } => run::test(filter.as_deref()),
        Task::Sim { arguments } => run::sim(&arguments),
        Task::Fuzz { target, seconds } => {
            fuzz::fuzz(target.as_deref(), fuzz::Length::Seconds(seconds))
        }
        Task::Stress { filter } => run::stress(filter.as_deref()),
        Task::Lint => run::lint(),
        Task::Ci => run::ci(),
        Task::Bench { runs, quick, only } => {
            run::bench(if quick { 3 } else { runs }, only.as_deref())
        }
    };
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
