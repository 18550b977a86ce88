//! How long a client waits when the primary dies, and what the waiting for it costs.
//!
//! `cargo xtask bench` runs it. Each run has a lab of its own: a live echo connection at 1 kHz, and
//! the longest gap between two echoes across the death of the primary.

use std::time::Duration;

use anyhow::{Context, Result};
use tests::pulse::Pulse;
use tests::report::{millis, spread, table};
use tests::{Agent, Death, Lab, Pair, Settings};

/// Heartbeats and how many may be missed.
const HEARTBEATS: [(&str, u32, Duration); 2] = [
    ("10ms", 3, Duration::from_millis(33)),
    ("1ms", 3, Duration::from_millis(10)),
];
const DEATHS: [(&str, Death); 2] = [("link cut", Death::LinkCut), ("kill -9", Death::Kill9)];
/// Echoes before the death and after the takeover.
const STEADY: u64 = 300;
/// How long an idle agent is watched.
const IDLE: Duration = Duration::from_secs(10);

fn main() -> Result<()> {
    let runs = runs_wanted()?;
    println!("Blackout of a live echo connection at 1 kHz, {runs} runs each\n");
    let mut rows = vec![head(&[
        "heartbeats",
        "death",
        "median",
        "least",
        "greatest",
        "target",
    ])];
    for (interval, missed, target) in HEARTBEATS {
        for (name, death) in DEATHS {
            let gaps = (0..runs)
                .map(|_| blackout(&Settings::heartbeat(interval, missed), death))
                .collect::<Result<Vec<_>>>()?;
            let (median, least, greatest) = spread(&gaps);
            let row = [median, least, greatest].map(millis);
            let row = [format!("{interval} × {missed}"), name.into()]
                .into_iter()
                .chain(row);
            rows.push(row.chain([format!("≤ {}", millis(target))]).collect());
        }
    }
    println!("{}", table(&rows));
    println!(
        "CPU of an idle agent at 1 ms heartbeats, over {} s\n",
        IDLE.as_secs()
    );
    println!("{}", table(&idle_cpu()?));
    Ok(())
}

fn head(names: &[&str]) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

/// `--runs N`
fn runs_wanted() -> Result<u32> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &*arguments {
        [] => Ok(20),
        [flag, number] if flag == "--runs" => {
            let runs = number
                .parse()
                .with_context(|| format!("--runs: found {number:?}"))?;
            anyhow::ensure!(runs > 0, "--runs: found 0, expected 1 or more");
            Ok(runs)
        }
        _ => anyhow::bail!("usage: blackout [--runs N]"),
    }
}

fn blackout(settings: &Settings, death: Death) -> Result<Duration> {
    let lab = Lab::build(&Default::default())?;
    let pair = Pair::start(&lab, settings);
    let pulse = Pulse::start(&lab)?;
    pair.backup.wait_flows("lockstep", 1);
    pulse.beat_on(STEADY);
    pair.primary_dies(&lab, death);
    pair.wait_takeover();
    pulse.beat_on(STEADY);
    let seen = pulse.finish().context("the connection did not survive")?;
    Ok(seen.longest)
}

fn idle_cpu() -> Result<Vec<Vec<String>>> {
    let lab = Lab::build(&Default::default())?;
    let pair = Pair::start(&lab, &Settings::heartbeat("1ms", 3));
    let agents = [("active", &pair.primary), ("standby", &pair.backup)];
    let before = agents.map(|(_, agent)| cpu_time(agent));
    std::thread::sleep(IDLE);
    let mut rows = vec![head(&["agent", "of one core"])];
    for ((name, agent), before) in agents.into_iter().zip(before) {
        let used = cpu_time(agent)?.saturating_sub(before?);
        let share = 100.0 * used.as_secs_f64() / IDLE.as_secs_f64();
        rows.push(vec![name.into(), format!("{share:.1} %")]);
    }
    Ok(rows)
}

/// utime + stime of a process (proc_pid_stat(5), fields 14 and 15).
fn cpu_time(agent: &Agent) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", agent.pid()))?;
    // The name in parentheses may hold blanks; fields are counted behind it.
    let (_, fields) = stat.rsplit_once(") ").context("/proc/PID/stat")?;
    let ticks: u64 = fields
        .split(' ')
        .skip(11)
        .take(2)
        .map(|field| field.parse().unwrap_or(0_u64))
        .sum();
    let hertz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("CLK_TCK")?;
    Ok(Duration::from_secs_f64(ticks as f64 / hertz as f64))
}
