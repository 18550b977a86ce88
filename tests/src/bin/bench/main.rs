//! What a takeover, a shadow and an idle agent cost, with real agents and real clients.
//!
//! `cargo xtask bench` runs it. Each run has a lab of its own. Prints Markdown: a table for each
//! subject, then one line for each figure, `=> what | measured | target | met?`, which xtask gathers
//! into the summary.

mod adoption;
mod again;
mod blackout;
mod bulk;
mod capped;
mod connections;
mod idle;
mod meter;
mod plain;
mod process;
mod requests;
mod settled;
mod site;
mod switchover;
mod takeover;
mod uncapped;
mod upload;

use anyhow::{Context, Result, ensure};
use tests::report::Figure;

/// Measures a subject, prints its tables, and returns its figures.
type Measure = fn(usize) -> Result<Vec<Figure>>;

/// What can be measured, by the name that `--only` knows.
const SUBJECTS: [(&str, Measure); 11] = [
    ("blackout", blackout::measure),
    ("switchover", switchover::measure),
    ("takeover", takeover::measure),
    ("adoption", adoption::measure),
    ("again", again::measure),
    ("upload", upload::measure),
    ("idle", idle::measure),
    ("capped", capped::measure),
    ("uncapped", uncapped::measure),
    ("requests", requests::measure),
    ("connections", connections::measure),
];

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments == [plain::ARGUMENT] {
        return plain::serve();
    }
    let wanted = Wanted::parse(&arguments)?;
    // 10,000 clients, each with a descriptor.
    rfsis_agent::sys::raise_open_files().context("raising the limit of open files")?;
    println!("{}\n", machine()?);
    let mut figures = Vec::new();
    for (_, measure) in SUBJECTS.iter().filter(|(name, _)| wanted.includes(name)) {
        figures.extend(measure(wanted.runs)?);
    }
    for figure in figures {
        println!("{figure}");
    }
    Ok(())
}

/// `[--runs N] [--only NAME]`
struct Wanted {
    runs: usize,
    only: Option<String>,
}

impl Wanted {
    fn parse(arguments: &[String]) -> Result<Self> {
        let mut wanted = Self {
            runs: 20,
            only: None,
        };
        let mut rest = arguments.iter();
        while let Some(flag) = rest.next() {
            match (&**flag, rest.next()) {
                ("--runs", Some(number)) => {
                    wanted.runs = number
                        .parse()
                        .with_context(|| format!("--runs: found {number:?}, expected a number"))?;
                    ensure!(wanted.runs > 0, "--runs: found 0, expected 1 or more");
                }
                ("--only", Some(name)) => {
                    let names = SUBJECTS.map(|(name, _)| name);
                    ensure!(
                        names.contains(&&**name),
                        "--only: found {name:?}, expected one of {}",
                        names.join(", ")
                    );
                    wanted.only = Some(name.clone());
                }
                _ => anyhow::bail!("usage: bench [--runs N] [--only NAME]"),
            }
        }
        Ok(wanted)
    }

    fn includes(&self, name: &str) -> bool {
        self.only.as_deref().is_none_or(|only| only == name)
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
         bridge of veths, MTU 1500) share the machine, and nothing is pinned unless said; load average \
         before: {}. Congestion control: {}.",
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
