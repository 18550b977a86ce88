//! `cargo xtask sim`: runs seeds of the simulation, replays one, makes it smaller.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use rfsis_agent::simulation::invariant::Violation;
use rfsis_agent::simulation::run::{Fault, History, Tally, caught};

/// Seeds that a thread takes at once.
const BATCH: u64 = 64;

#[derive(Parser)]
#[command(name = "cargo xtask sim", about = "Run seeds of the simulation")]
struct Arguments {
    /// How many seeds
    #[arg(long, default_value_t = 10_000)]
    seeds: u64,
    /// The first of them
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Threads; as many as there are cores if not given
    #[arg(long)]
    jobs: Option<usize>,
    /// Replay this one, and print what happens
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// Only these of its troubles, `none` for none
    #[arg(long, value_name = "NUMBERS", requires = "seed", value_parser = numbers)]
    keep: Option<Numbers>,
    /// Only these of its clients
    #[arg(long, value_name = "NUMBERS", requires = "seed", value_parser = numbers)]
    clients: Option<Numbers>,
    /// Find the smallest that still fails
    #[arg(long)]
    minimise: bool,
    /// With a deliberate fault in the code, by its name
    #[arg(long, value_parser = fault)]
    fault: Option<Fault>,
    /// Go on where a seed fails, and list them
    #[arg(long)]
    all: bool,
    /// Try each deliberate fault with up to this many seeds: a table
    #[arg(long, value_name = "SEEDS", exclusive = true)]
    faults: Option<u64>,
}

#[derive(Clone)]
struct Numbers(Vec<usize>);

fn numbers(text: &str) -> Result<Numbers, String> {
    if text == "none" {
        return Ok(Numbers(vec![]));
    }
    let parse = |number: &str| number.trim().parse().map_err(|_| number.to_owned());
    let numbers: Result<_, String> = text.split(',').map(parse).collect();
    numbers.map(Numbers)
}

fn fault(name: &str) -> Result<Fault, String> {
    let found = Fault::ALL.into_iter().find(|f| format!("{f:?}") == name);
    found.ok_or_else(|| format!("none of {:?}", Fault::ALL))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match (arguments.seed, arguments.faults) {
        (Some(seed), _) => replay(seed, &arguments),
        (None, Some(seeds)) => faults(seeds),
        (None, None) => run(&arguments),
    }
}

/// A table of the faults, in Markdown; a fault that is not caught fails it.
fn faults(seeds: u64) -> ExitCode {
    println!("| fault | caught after seeds | by |\n|---|---|---|");
    let mut all = true;
    for fault in Fault::ALL {
        match caught(fault, seeds) {
            Some((seed, violation)) => {
                println!("| {fault:?} | {} | {violation} |", seed + 1);
            }
            None => {
                all = false;
                println!("| {fault:?} | not by {seeds} | |");
            }
        }
    }
    ExitCode::from(u8::from(!all))
}

fn replay(seed: u64, arguments: &Arguments) -> ExitCode {
    let mut history = History::of(seed);
    if let Some(Numbers(kept)) = &arguments.keep {
        history = history.keep(kept);
    }
    if let Some(Numbers(clients)) = &arguments.clients {
        history = history.clients(clients);
    }
    if arguments.minimise {
        return match history.run(arguments.fault, false) {
            Ok(_) => {
                println!("seed {seed} holds: there is nothing to make smaller");
                ExitCode::SUCCESS
            }
            Err(violation) => {
                minimise(&history, &violation, arguments.fault);
                ExitCode::FAILURE
            }
        };
    }
    print!("{}", history.describe());
    match history.run(arguments.fault, true) {
        Ok(tally) => {
            println!("\n{tally}");
            ExitCode::SUCCESS
        }
        Err(violation) => {
            println!("\n{violation}");
            ExitCode::FAILURE
        }
    }
}

fn minimise(history: &History, violation: &Violation, fault: Option<Fault>) {
    let smallest = history.minimise(fault, violation);
    print!("{}", smallest.describe());
    if let Err(violation) = smallest.run(fault, false) {
        println!("{violation}");
    }
    println!("replay: {}", smallest.command());
}

fn run(arguments: &Arguments) -> ExitCode {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = arguments.jobs.unwrap_or(cores).max(1);
    let next = AtomicU64::new(arguments.first);
    let end = arguments.first.saturating_add(arguments.seeds);
    let stop = AtomicBool::new(false);
    let total = Mutex::new(Tally::default());
    let failed: Mutex<Vec<(u64, Violation)>> = Mutex::new(vec![]);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                let mut tally = Tally::default();
                while !stop.load(Ordering::Relaxed) {
                    let from = next.fetch_add(BATCH, Ordering::Relaxed);
                    if from >= end {
                        break;
                    }
                    for seed in from..end.min(from + BATCH) {
                        match History::of(seed).run(arguments.fault, false) {
                            Ok(one) => tally.add(&one),
                            Err(violation) => {
                                lock(&failed).push((seed, violation));
                                stop.store(!arguments.all, Ordering::Relaxed);
                            }
                        }
                    }
                }
                lock(&total).add(&tally);
            });
        }
    });
    let took = began.elapsed().as_secs_f64();
    let total = lock(&total);
    let mut failed = lock(&failed);
    failed.sort_by_key(|(seed, _)| *seed);
    let runs = total.runs + failed.len() as u64;
    println!("{total}");
    let rate = runs as f64 / took;
    println!(
        "{runs} seeds in {took:.1} s, {rate:.0} a second, {:.0} a second and thread",
        rate / jobs as f64
    );
    for (seed, violation) in failed.iter() {
        println!("FAILED seed {seed}: {violation}");
    }
    let Some((seed, violation)) = failed.first() else {
        return ExitCode::SUCCESS;
    };
    if arguments.minimise {
        minimise(&History::of(*seed), violation, arguments.fault);
    } else {
        println!("replay: {}", History::of(*seed).command());
    }
    ExitCode::FAILURE
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
