//! What a takeover, a shadow and an idle agent cost, with real agents and real clients.
//!
//! `cargo xtask bench` runs it. Each run has a lab of its own. Prints Markdown: a table for each
//! subject, then one line for each figure, `=> what | measured | target | met?`, which xtask gathers
//! into the summary.

mod blackout;
mod idle;
mod process;
mod settled;
mod takeover;
mod upload;

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let runs = runs_wanted()?;
    // 10,000 clients, each with a descriptor.
    rfsis_agent::sys::raise_open_files().context("raising the limit of open files")?;
    println!("{}\n", machine()?);
    let mut figures = Vec::new();
    for measure in [
        blackout::measure,
        takeover::measure,
        upload::measure,
        idle::measure,
    ] {
        figures.extend(measure(runs)?);
    }
    for figure in figures {
        println!("{figure}");
    }
    Ok(())
}

/// `--runs N`
fn runs_wanted() -> Result<usize> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &*arguments {
        [] => Ok(20),
        [flag, number] if flag == "--runs" => {
            let runs = number
                .parse()
                .with_context(|| format!("--runs: found {number:?}, expected a number"))?;
            anyhow::ensure!(runs > 0, "--runs: found 0, expected 1 or more");
            Ok(runs)
        }
        _ => anyhow::bail!("usage: bench [--runs N]"),
    }
}

/// Where the figures come from.
fn machine() -> Result<String> {
    let read = |path| std::fs::read_to_string(path).with_context(|| format!("reading {path}"));
    let release = read("/proc/sys/kernel/osrelease")?;
    let congestion_control = read("/proc/sys/net/ipv4/tcp_congestion_control")?;
    let cpus = read("/proc/cpuinfo")?;
    let model = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown CPU", |(_, model)| model);
    let load = read("/proc/loadavg")?;
    Ok(format!(
        "Linux {}, {} cores of {model}, agent built {}. Client, both nodes and the LAN (a flooding \
         bridge of veths, MTU 1500) share the machine, and nothing is pinned; load average before: \
         {}. Congestion control: {}.",
        release.trim(),
        std::thread::available_parallelism()?,
        if cfg!(debug_assertions) {
            "for debugging"
        } else {
            "for release"
        },
        load.split(' ').next().unwrap_or_default(),
        congestion_control.trim(),
    ))
}
