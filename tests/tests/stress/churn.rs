//! Connections that come and go all the time.

use std::time::Duration;

use rfsis_agent::sys::raise_open_files;
use tests::agent::port;
use tests::churn::Churn;
use tests::patience::wait_at_most;
use tests::{Capture, Cluster, Failover, LabOptions, Typist, Wiring};

const PER_SECOND: u32 = 1_000;
const DURATION: Duration = Duration::from_secs(20);
/// Until nothing is left of them: some flows are remembered for a minute behind their FIN.
const TO_FORGET: Duration = Duration::from_secs(150);

#[test]
fn a_thousand_connections_a_second_go_on_across_a_kill_and_nothing_is_left_of_them() {
    raise_open_files().unwrap();
    let lab = Wiring::Mirror.lab_with(LabOptions {
        // Each leaves a port in TIME-WAIT.
        client_sysctls: vec![("ipv4/ip_local_port_range", "2000 65000")],
        ..LabOptions::default()
    });
    let mut cluster = Cluster::start(&lab, &Wiring::Mirror.settings());
    cluster.active().wait_not_degraded();
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    cluster.wait_redundant(1, Duration::from_secs(20));
    let before = [cluster.active(), cluster.standby()].map(|agent| agent.descriptors().unwrap());
    let capture = Capture::start(&lab);
    let churn = Churn::start(&lab, PER_SECOND, DURATION);
    let connections = [("service", "echo-tcp")];
    let half = f64::from(PER_SECOND) * DURATION.as_secs_f64() / 2.0;
    cluster
        .active()
        .wait_metric("rfsis_connections_total", &connections, half);
    cluster.fail_over(Failover::Kill9);
    let outcomes = churn.finish().unwrap();
    nc.echoes("after");
    println!(
        "{} exact, failed {:?}, longest {:?}",
        outcomes.exact, outcomes.failed, outcomes.longest
    );
    assert_eq!(outcomes.wrong, Vec::<String>::new());
    assert!(outcomes.failed.is_empty(), "{:?}", outcomes.failed);
    let total = (f64::from(PER_SECOND) * DURATION.as_secs_f64()) as usize;
    assert_eq!(outcomes.exact, total);
    let trace = capture.stop();
    trace.no_byte_from_vip_changed().unwrap();
    for (agent, before) in [cluster.active(), cluster.standby()]
        .into_iter()
        .zip(before)
    {
        let left = || {
            let flows = (agent.live_flows().unwrap(), agent.guarded_flows().unwrap());
            (flows, agent.descriptors().unwrap(), before)
        };
        wait_at_most(
            TO_FORGET,
            "only nc to be left",
            left,
            |&(flows, descriptors, before)| {
                flows.0 <= 1 && flows.1 <= 1 && descriptors <= before + 2
            },
        );
    }
}
