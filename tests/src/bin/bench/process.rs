//! What a running agent takes from its host.

use std::time::Duration;

use anyhow::{Context, Result};
use tests::Agent;

/// utime + stime (proc_pid_stat(5), fields 14 and 15).
pub fn cpu_time(agent: &Agent) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", agent.pid()))?;
    // The name in parentheses may hold blanks; fields are counted behind it.
    let (_, fields) = stat.rsplit_once(") ").context("/proc/PID/stat")?;
    let mut ticks = 0;
    for field in fields.split(' ').skip(11).take(2) {
        ticks += field.parse::<u64>().context("/proc/PID/stat")?;
    }
    let hertz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("CLK_TCK")?;
    Ok(Duration::from_secs_f64(ticks as f64 / hertz as f64))
}

/// Memory in use, KiB (VmRSS of proc_pid_status(5)).
pub fn resident_kib(agent: &Agent) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid()))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("no VmRSS in /proc/PID/status")?;
    let number = line.trim().trim_end_matches(" kB");
    number.parse().with_context(|| format!("VmRSS:{line}"))
}

/// How often the thread of this name has gone to sleep (voluntary_ctxt_switches).
pub fn sleeps(agent: &Agent, thread: &str) -> Result<u64> {
    for task in std::fs::read_dir(format!("/proc/{}/task", agent.pid()))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        let field = |name| status.lines().find_map(|line| line.strip_prefix(name));
        if field("Name:").map(str::trim) == Some(thread) {
            let count = field("voluntary_ctxt_switches:").context("no voluntary_ctxt_switches")?;
            return Ok(count.trim().parse()?);
        }
    }
    anyhow::bail!("the agent has no thread {thread}")
}
