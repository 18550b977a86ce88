//! A netcat session that survives the death of its server, before your eyes.
//!
//! `cargo xtask demo` runs it. Everything happens in namespaces without names: nothing on the
//! machine is touched, and nothing is left when this process is gone, however it ends.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::agent::port;
use tests::interrupt::remove_on_interrupt;
use tests::pulse::Pulse;
use tests::report::millis;
use tests::{Agent, Bridge, Capture, Lab, LabOptions, Pair, Typist, VIP};

/// The shipped config, used as it is: each node has a `/run` of its own.
const CONFIG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../config.yaml");
/// Echoes at 1 kHz before the death and after the takeover.
const STEADY: u64 = 500;

fn main() -> Result<()> {
    let began = Instant::now();
    say("three hosts on a switch: client 192.168.1.50, node a 192.168.1.1, node b 192.168.1.2");
    let lab = Lab::build(&LabOptions {
        bridge: Bridge::Learning,
        ..LabOptions::default()
    })?;
    remove_on_interrupt(lab.directory().to_owned())?;

    say("rfsis-agent on both nodes, with the shipped config.yaml: a as primary, b as backup");
    let pair = Pair::start_with(&lab, Path::new(CONFIG))?;
    // On a machine too busy for 30 ms deadlines they may have changed places already.
    let (active, standby) = pair.by_state();
    show_states([&active, &standby]);
    // A connection that opens while the standby does not answer is not protected.
    active.wait_status("protection sync", |status| {
        status["protection"]["mode"] == "sync"
    });

    let capture = Capture::start(&lab);
    say(&format!("client$ nc {VIP} {}", port::ECHO));
    let mut nc = Typist::tcp(&lab, port::ECHO);
    type_and_read(&mut nc, "hello, is anybody there?")?;
    type_and_read(&mut nc, "good: let us see who survives")?;
    // A second session speaks every millisecond, to time the pause.
    let pulse = Pulse::start(&lab)?;
    standby.wait_flows("lockstep", 2);
    active.wait_status("two guarded flows", |status| {
        status["protection"]["guarded"] == 2
    });
    show_protection(&active);
    pulse.beat_on(STEADY);
    let before = standby.metrics();

    say(&format!(
        "{}$ kill -9 {}        (the active node)",
        active.host().address(),
        active.pid()
    ));
    active.kill9();
    type_and_read(
        &mut nc,
        "typed into the same session while its server is dead",
    )?;
    standby.wait_state("active");
    type_and_read(&mut nc, "and afterwards: still the same connection")?;
    pulse.beat_on(STEADY);
    ensure!(nc.is_connected(), "nc has ended");

    let seen = pulse.finish()?;
    ensure!(nc.hang_up().success(), "nc ended badly");
    say("client: hangs up; both sides close in order");
    let trace = capture.stop();
    trace.no_reset_from_vip()?;
    trace.no_byte_from_vip_changed()?;
    trace.dead_host_is_silent(active.host().mac(), standby.host().mac())?;

    heading("what the client saw");
    println!("  longest pause at 1 kHz      {}", millis(seen.longest));
    println!(
        "  numbers sent and echoed     {} of {}, in order",
        seen.spoken, seen.spoken
    );
    println!("  resets                      0");
    println!("  bytes changed or repeated   0");
    println!("  frames from the dead host   0 after the survivor spoke");
    let neighbour = lab.client().sh(&format!("ip neigh show {VIP}"))?;
    println!("  the client's ARP entry      {}", neighbour.trim());

    heading("metrics of the survivor that tell it");
    let after = standby.metrics();
    for (series, before, after) in after.changed_since(&before) {
        if tells_the_story(&series) {
            println!("  {series:60} {before:>8} → {after}");
        }
    }
    heading("status of the survivor");
    let status = standby.ask(&["status"]);
    for line in String::from_utf8_lossy(&status.stdout).lines() {
        println!("  {line}");
    }
    println!(
        "\nDone in {:.0} s. Nothing is left behind.",
        began.elapsed().as_secs_f64()
    );
    Ok(())
}

fn say(what: &str) {
    println!("▸ {what}");
}

fn heading(what: &str) {
    println!("\n{what}");
}

fn type_and_read(nc: &mut Typist, line: &str) -> Result<()> {
    let typed = Instant::now();
    nc.type_line(line)?;
    println!("    ⌨  {line}");
    let echo = nc
        .read_line(Duration::from_secs(10))
        .context("no echo within ten seconds")?;
    ensure!(echo == line, "typed {line:?}, read {echo:?}");
    println!("    ⮑  {echo}        ({})", millis(typed.elapsed()));
    Ok(())
}

fn show_states(agents: [&Agent; 2]) {
    for agent in agents {
        if let Some(status) = agent.status() {
            let word = |field: &str| status[field].as_str().unwrap_or("?").to_owned();
            let (node, role, state) = (word("node"), word("role"), word("state"));
            println!("    {node} ({role}) is {state}, epoch {}", status["epoch"]);
        }
    }
}

fn show_protection(agent: &Agent) {
    let status = agent.ask(&["status"]);
    let text = String::from_utf8_lossy(&status.stdout);
    for line in text.lines().filter(|line| line.starts_with("protection")) {
        println!("    {line}");
    }
}

/// Counters of every frame would drown what a takeover changed.
fn tells_the_story(series: &str) -> bool {
    [
        "rfsis_state",
        "rfsis_epoch",
        "rfsis_failovers_total",
        "rfsis_takeover_duration_seconds_sum",
        "rfsis_flows",
        "rfsis_flow_resets_total",
        "rfsis_protection",
        "rfsis_xdp_packets_total",
        "rfsis_gate_packets_total",
    ]
    .iter()
    .any(|name| series.starts_with(name))
}
