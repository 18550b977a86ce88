//! Very many connections at once.

use std::time::Duration;

use rfsis_agent::sys::raise_open_files;
use tests::client::{clients, hears, says};
use tests::patience::wait_at_most;
use tests::{Agent, Capture, Cluster, Failover, Wiring};

const CONNECTIONS: u64 = 10_000;
/// Until all of them are protected again.
const TO_REPAIR: Duration = Duration::from_secs(120);
/// What a node may need for one connection, KiB, as kernel socket or as shadow.
const EACH_KIB: u64 = 32;

fn resident(agents: [&Agent; 2]) -> [u64; 2] {
    agents.map(|agent| agent.resident_kib().unwrap())
}

#[test]
fn ten_thousand_connections_survive_a_kill_and_a_switchover_back_each_of_them() {
    raise_open_files().unwrap();
    let lab = Wiring::Mirror.lab();
    let mut cluster = Cluster::start(&lab, &Wiring::Mirror.settings());
    cluster.active().wait_not_degraded();
    let empty = resident([cluster.active(), cluster.standby()]);
    let streams = clients(&lab, CONNECTIONS);
    cluster.wait_redundant(CONNECTIONS, TO_REPAIR);
    let full = resident([cluster.active(), cluster.standby()]);
    let capture = Capture::start(&lab);
    for (seeds, how) in [
        (20_000.., Failover::Kill9),
        (40_000.., Failover::Switchover),
    ] {
        cluster.fail_over(how);
        for (stream, seed) in streams.iter().zip(seeds.clone()) {
            says(stream, seed).unwrap();
        }
        for (stream, seed) in streams.iter().zip(seeds) {
            hears(stream, seed).unwrap();
        }
        cluster.wait_redundant(CONNECTIONS, TO_REPAIR);
    }
    let after = resident([cluster.active(), cluster.standby()]);
    println!(
        "resident KiB of active and standby: {empty:?} without, {full:?} with {CONNECTIONS} connections, {after:?} after two failovers"
    );
    for (after, empty) in full.into_iter().chain(after).zip(empty.into_iter().cycle()) {
        assert!(after < empty + CONNECTIONS * EACH_KIB);
    }
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
    drop(streams);
    for agent in [cluster.active(), cluster.standby()] {
        let left = || {
            let flows = (agent.live_flows().unwrap(), agent.guarded_flows().unwrap());
            (flows, agent.descriptors().unwrap())
        };
        wait_at_most(
            TO_REPAIR,
            "all to be given back",
            left,
            |&(flows, descriptors)| flows == (0, 0) && descriptors < 200,
        );
    }
}
