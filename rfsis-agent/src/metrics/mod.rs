//! What is counted, and `/metrics`, `/live`, `/ready` over HTTP.
//!
//! A label with a fixed set of values is an enum ([`Label`]): every series exists from the start and is
//! updated by one atomic add. A client's address is never a label.

mod http;
mod label;
#[cfg(test)]
mod tests;

use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::{
    Counter, Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec,
    IntGauge, Opts, Registry, TextEncoder,
};
use rfsis_common::ack_gate::AckGateVerdict;
use rfsis_common::maps::State;
use rfsis_common::mirror::MirrorVerdict;
use rfsis_common::verdict::{GateVerdict, XdpVerdict};

use crate::bpf::XdpMode;
pub use http::{BindError, Readiness, bind, serve};
pub use label::{
    AdoptionResult, DatagramResult, FlowCondition, FrameResult, GuardCondition, HeartbeatReceived,
    HeartbeatSent, JoinResult, Label, Protection, ReplayResult, ResetReason, Ring, SyncReceived,
    SyncSent,
};

/// Bounds of `rfsis_takeover_duration_seconds`, seconds.
const TAKEOVER_BUCKETS: [f64; 14] = [
    50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 0.1, 0.2, 0.5, 1.0,
];

/// Bounds of `rfsis_late_join_duration_seconds`, seconds.
const JOIN_BUCKETS: [f64; 10] = [200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 20e-3, 0.1, 0.5, 2.0, 10.0];

/// Bounds of `rfsis_adoption_duration_seconds`, seconds.
const ADOPTION_BUCKETS: [f64; 11] = [
    5e-6, 10e-6, 20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3,
];

/// One counter for each value of a label.
#[derive(Clone, Debug)]
pub struct Counters<L> {
    children: Vec<IntCounter>,
    label: PhantomData<fn(L)>,
}

impl<L: Label> Counters<L> {
    fn new(child: impl Fn(&str) -> IntCounter) -> Self {
        Self {
            children: L::ALL.iter().map(|value| child(value.as_str())).collect(),
            label: PhantomData,
        }
    }

    /// Counts one.
    pub fn inc(&self, value: L) {
        self.add(value, 1);
    }

    /// Counts several.
    pub fn add(&self, value: L, count: u64) {
        self.children[value.index()].inc_by(count);
    }

    /// The count so far.
    pub fn get(&self, value: L) -> u64 {
        self.children[value.index()].get()
    }

    /// Follows a counter that is kept elsewhere (in the kernel). Never goes back, so that programs
    /// loaded anew do not look like negative traffic. One caller at a time: meant for the
    /// [`ScrapeHook`].
    pub fn raise_to(&self, value: L, total: u64) {
        self.add(value, total.saturating_sub(self.get(value)));
    }
}

/// One gauge for each value of a label.
#[derive(Clone, Debug)]
pub struct Gauges<L> {
    children: Vec<Gauge>,
    label: PhantomData<fn(L)>,
}

impl<L: Label + PartialEq> Gauges<L> {
    /// Sets one.
    pub fn set(&self, value: L, number: f64) {
        self.children[value.index()].set(number);
    }

    /// The number as set last.
    pub fn get(&self, value: L) -> f64 {
        self.children[value.index()].get()
    }

    /// Sets one to 1 and the others to 0, in this order: at every moment one is chosen.
    pub fn choose(&self, chosen: L) {
        self.set(chosen, 1.0);
        for value in L::ALL.iter().filter(|value| **value != chosen) {
            self.set(*value, 0.0);
        }
    }

    /// The one that was chosen; `None` before the first choice.
    pub fn chosen(&self) -> Option<L> {
        L::ALL.iter().copied().find(|value| self.get(*value) > 0.0)
    }
}

/// All metrics of the agent, cheap to update from any thread.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Two scrapes at a time would both add the same kernel counts.
    scrape: Mutex<()>,
    /// `rfsis_state{state}`, 0 or 1.
    pub state: Gauges<State>,
    /// `rfsis_epoch`.
    pub epoch: IntGauge,
    /// `rfsis_failovers_total{reason}`; reasons are a fixed few words.
    pub failovers: IntCounterVec,
    /// `rfsis_redundant`, 0 or 1.
    pub redundant: IntGauge,
    /// `rfsis_without_redundancy_seconds_total`.
    pub without_redundancy: Counter,
    /// `rfsis_takeover_duration_seconds`.
    pub takeover_duration: Histogram,
    /// `rfsis_carrier`, 0 or 1.
    pub carrier: IntGauge,
    /// `rfsis_heartbeat_age_seconds`, set by the scrape hook.
    pub heartbeat_age: Gauge,
    /// `rfsis_heartbeats_total{direction="sent"}`.
    pub heartbeats_sent: Counters<HeartbeatSent>,
    /// `rfsis_heartbeats_total{direction="received"}`.
    pub heartbeats_received: Counters<HeartbeatReceived>,
    /// `rfsis_sync_datagrams_total{direction="sent"}`.
    pub sync_sent: Counters<SyncSent>,
    /// `rfsis_sync_datagrams_total{direction="received"}`.
    pub sync_received: Counters<SyncReceived>,
    /// `rfsis_sync_records_skipped_total`.
    pub sync_records_skipped: IntCounter,
    /// `rfsis_pledges_broken_total`.
    pub pledges_broken: IntCounter,
    /// `rfsis_protection{mode}`, 0 or 1.
    pub protection: Gauges<Protection>,
    /// `rfsis_guarded_flows{condition}`.
    pub guarded_flows: Gauges<GuardCondition>,
    /// `rfsis_guard_refused_total`.
    pub guard_refused: IntCounter,
    /// `rfsis_guard_stuck_total`.
    pub guard_stuck: IntCounter,
    /// `rfsis_late_joins_total{result}`.
    pub late_joins: Counters<JoinResult>,
    /// `rfsis_late_join_duration_seconds`.
    pub late_join_duration: Histogram,
    /// `rfsis_late_joins_waiting`.
    pub late_joins_waiting: IntGauge,
    /// `rfsis_flows{condition}`.
    pub flows: Gauges<FlowCondition>,
    /// `rfsis_flows_refused_total`.
    pub flows_refused: IntCounter,
    /// `rfsis_flow_resets_total{reason}`.
    pub flow_resets: Counters<ResetReason>,
    /// `rfsis_adoptions_total{result}`.
    pub adoptions: Counters<AdoptionResult>,
    /// `rfsis_adoption_duration_seconds`.
    pub adoption_duration: Histogram,
    /// `rfsis_shadow_lag_bytes`.
    pub shadow_lag: IntGauge,
    /// `rfsis_shadow_bytes`.
    pub shadow_bytes: IntGauge,
    /// `rfsis_frames_total{result}`.
    pub frames: Counters<FrameResult>,
    /// `rfsis_xdp_packets_total{verdict}`, set by the scrape hook.
    pub xdp_packets: Counters<XdpVerdict>,
    /// `rfsis_ring_dropped_total{ring}`, set by the scrape hook.
    pub ring_dropped: Counters<Ring>,
    /// `rfsis_gate_packets_total{verdict}`, set by the scrape hook.
    pub gate_packets: Counters<GateVerdict>,
    /// `rfsis_mirror_packets_total{verdict}`, set by the scrape hook.
    pub mirror_packets: Counters<MirrorVerdict>,
    /// `rfsis_ack_gate_packets_total{verdict}`, set by the scrape hook.
    pub ack_gate_packets: Counters<AckGateVerdict>,
    /// `rfsis_xdp_mode{mode}`, 0 or 1.
    pub xdp_mode: Gauges<XdpMode>,
    /// `rfsis_held_released_total`.
    pub held_released: IntCounter,
    /// `rfsis_held_doubted_total`.
    pub held_doubted: IntCounter,
    /// `rfsis_datagrams_replayed_total{result}`.
    pub datagrams_replayed: Counters<ReplayResult>,
    /// `rfsis_shadow_send_failures_total`.
    pub shadow_send_failures: IntCounter,
    connections: IntCounterVec,
    accept_errors: IntCounterVec,
    datagrams: IntCounterVec,
}

impl Metrics {
    /// All metrics at zero, in a registry of their own. `version` is that of the agent.
    ///
    /// # Errors
    /// None in practice: `prometheus` refuses bad or repeated names, and these are constants.
    pub fn new(version: &str) -> prometheus::Result<Metrics> {
        let family = Families {
            registry: Registry::new(),
        };
        let build_info = family.gauges("rfsis_build_info", "Version of the agent.", "version")?;
        build_info.with_label_values(&[version]).set(1.0);
        let heartbeats = family.counters(
            "rfsis_heartbeats_total",
            "Heartbeats by direction and result.",
            &["direction", "result"],
        )?;
        let sync_datagrams = family.counters(
            "rfsis_sync_datagrams_total",
            "Datagrams between the nodes by direction and result.",
            &["direction", "result"],
        )?;
        Ok(Metrics {
            state: family.labelled_gauges(
                "rfsis_state",
                "1 for what the node is now, 0 for the rest.",
                "state",
            )?,
            epoch: family.integer("rfsis_epoch", "Number that grows with each takeover.")?,
            failovers: family.counters(
                "rfsis_failovers_total",
                "Takeovers by this node; becoming active at the start does not count.",
                &["reason"],
            )?,
            redundant: family.integer(
                "rfsis_redundant",
                "1 while the death of either node would cost no connection.",
            )?,
            without_redundancy: family.register(Counter::new(
                "rfsis_without_redundancy_seconds_total",
                "Time in which the death of a node would have cost connections.",
            )?)?,
            takeover_duration: family.register(Histogram::with_opts(
                HistogramOpts::new(
                    "rfsis_takeover_duration_seconds",
                    "From the deadline noticed to the first frame from the VIP.",
                )
                .buckets(TAKEOVER_BUCKETS.to_vec()),
            )?)?,
            carrier: family.integer(
                "rfsis_carrier",
                "1 while the VIP's interface has carrier; without it the node neither speaks nor takes over.",
            )?,
            heartbeat_age: family.register(Gauge::new(
                "rfsis_heartbeat_age_seconds",
                "Since the peer's last authentic heartbeat arrived.",
            )?)?,
            heartbeats_sent: Counters::new(|result| {
                heartbeats.with_label_values(&["sent", result])
            }),
            heartbeats_received: Counters::new(|result| {
                heartbeats.with_label_values(&["received", result])
            }),
            sync_sent: Counters::new(|result| sync_datagrams.with_label_values(&["sent", result])),
            sync_received: Counters::new(|result| {
                sync_datagrams.with_label_values(&["received", result])
            }),
            sync_records_skipped: family.counter(
                "rfsis_sync_records_skipped_total",
                "Records of the peer whose type this version does not know.",
            )?,
            pledges_broken: family.counter(
                "rfsis_pledges_broken_total",
                "Flows whose shadow could not take what the standby's kernel had confirmed: they were handed over anew.",
            )?,
            protection: family.labelled_gauges(
                "rfsis_protection",
                "1 for what this node can promise the VIP's clients.",
                "mode",
            )?,
            guarded_flows: family.labelled_gauges(
                "rfsis_guarded_flows",
                "Flows that the ACK gate knows, by condition.",
                "condition",
            )?,
            guard_refused: family.counter(
                "rfsis_guard_refused_total",
                "New flows let go unprotected because the standby did not take them.",
            )?,
            guard_stuck: family.counter(
                "rfsis_guard_stuck_total",
                "Flows that were handed over anew because the standby, though heard, confirmed nothing of them.",
            )?,
            late_joins: family.labelled_counters(
                "rfsis_late_joins_total",
                "Flows that a standby did not know, by what became of handing them over.",
                "result",
            )?,
            late_join_duration: family.register(Histogram::with_opts(
                HistogramOpts::new(
                    "rfsis_late_join_duration_seconds",
                    "From the standby's word that it does not know a flow to its shadow there.",
                )
                .buckets(JOIN_BUCKETS.to_vec()),
            )?)?,
            late_joins_waiting: family.integer(
                "rfsis_late_joins_waiting",
                "Flows that wait to be handed over to the standby, or are under way.",
            )?,
            flows: family.labelled_gauges("rfsis_flows", "Flows by condition.", "condition")?,
            flows_refused: family.counter(
                "rfsis_flows_refused_total",
                "New flows left unprotected at a bound.",
            )?,
            flow_resets: family.labelled_counters(
                "rfsis_flow_resets_total",
                "Flows reset at a takeover.",
                "reason",
            )?,
            adoptions: family.labelled_counters(
                "rfsis_adoptions_total",
                "Live shadows that became kernel sockets, or should have.",
                "result",
            )?,
            adoption_duration: family.register(Histogram::with_opts(
                HistogramOpts::new(
                    "rfsis_adoption_duration_seconds",
                    "From a live shadow's numbers to a kernel socket at its service.",
                )
                .buckets(ADOPTION_BUCKETS.to_vec()),
            )?)?,
            shadow_lag: family.integer(
                "rfsis_shadow_lag_bytes",
                "Bytes that the active acknowledged and the shadows lack.",
            )?,
            shadow_bytes: family.integer(
                "rfsis_shadow_bytes",
                "Bytes queued in all shadows together.",
            )?,
            frames: family.labelled_counters(
                "rfsis_frames_total",
                "Mirrored frames by what they were to the shadows.",
                "result",
            )?,
            xdp_packets: family.labelled_counters(
                "rfsis_xdp_packets_total",
                "Frames by verdict of the XDP program.",
                "verdict",
            )?,
            ring_dropped: family.labelled_counters(
                "rfsis_ring_dropped_total",
                "Entries lost to a full ring.",
                "ring",
            )?,
            gate_packets: family.labelled_counters(
                "rfsis_gate_packets_total",
                "Packets by verdict of the gate.",
                "verdict",
            )?,
            mirror_packets: family.labelled_counters(
                "rfsis_mirror_packets_total",
                "Frames of the VIP by what became of their copies for the standby.",
                "verdict",
            )?,
            ack_gate_packets: family.labelled_counters(
                "rfsis_ack_gate_packets_total",
                "TCP packets from a service's port by verdict of the ACK gate.",
                "verdict",
            )?,
            xdp_mode: family.labelled_gauges(
                "rfsis_xdp_mode",
                "1 for how the XDP program is attached.",
                "mode",
            )?,
            held_released: family.counter(
                "rfsis_held_released_total",
                "Held FIN and RST that were approved later.",
            )?,
            held_doubted: family.counter(
                "rfsis_held_doubted_total",
                "Held RST of connections that the guard knows, kept from the client the first time.",
            )?,
            datagrams_replayed: family.labelled_counters(
                "rfsis_datagrams_replayed_total",
                "UDP datagrams whose answer by the active was not seen.",
                "result",
            )?,
            shadow_send_failures: family.counter(
                "rfsis_shadow_send_failures_total",
                "Packets of live shadows and late UDP answers that the system refused to send.",
            )?,
            connections: family.counters(
                "rfsis_connections_total",
                "TCP connections accepted by the kernel.",
                &["service"],
            )?,
            accept_errors: family.counters(
                "rfsis_accept_errors_total",
                "TCP connections that the kernel could not hand over.",
                &["service"],
            )?,
            datagrams: family.counters(
                "rfsis_datagrams_total",
                "UDP datagrams by what became of them.",
                &["service", "result"],
            )?,
            registry: family.registry,
            scrape: Mutex::new(()),
        })
    }

    /// `rfsis_connections_total` of one service of the config.
    pub fn connections(&self, service: &str) -> IntCounter {
        self.connections.with_label_values(&[service])
    }

    /// `rfsis_accept_errors_total` of one service of the config.
    pub fn accept_errors(&self, service: &str) -> IntCounter {
        self.accept_errors.with_label_values(&[service])
    }

    /// `rfsis_datagrams_total` of one service of the config.
    pub fn datagrams(&self, service: &str) -> Counters<DatagramResult> {
        Counters::new(|result| self.datagrams.with_label_values(&[service, result]))
    }

    /// Calls the hook, then prints everything in the Prometheus text format.
    ///
    /// # Errors
    /// As the encoder's: none in practice.
    pub fn scrape(&self, hook: &ScrapeHook) -> prometheus::Result<Vec<u8>> {
        // The guard protects no data, so a panic of another scrape leaves nothing half-done.
        let one_at_a_time = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        hook(self);
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        drop(one_at_a_time);
        Ok(text)
    }
}

/// Makes and registers families.
struct Families {
    registry: Registry,
}

impl Families {
    fn register<C: prometheus::core::Collector + Clone + 'static>(
        &self,
        collector: C,
    ) -> prometheus::Result<C> {
        self.registry.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    fn integer(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.register(IntGauge::new(name, help)?)
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.register(IntCounter::new(name, help)?)
    }

    fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> prometheus::Result<IntCounterVec> {
        self.register(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    fn gauges(&self, name: &str, help: &str, label: &str) -> prometheus::Result<GaugeVec> {
        self.register(GaugeVec::new(Opts::new(name, help), &[label])?)
    }

    fn labelled_counters<L: Label>(
        &self,
        name: &str,
        help: &str,
        label: &str,
    ) -> prometheus::Result<Counters<L>> {
        let family = self.counters(name, help, &[label])?;
        Ok(Counters::new(|value| family.with_label_values(&[value])))
    }

    fn labelled_gauges<L: Label>(
        &self,
        name: &str,
        help: &str,
        label: &str,
    ) -> prometheus::Result<Gauges<L>> {
        let family = self.gauges(name, help, label)?;
        Ok(Gauges {
            children: L::ALL
                .iter()
                .map(|value| family.with_label_values(&[value.as_str()]))
                .collect(),
            label: PhantomData,
        })
    }
}

/// Reads what is kept elsewhere, such as the kernel's counters, at each scrape; never twice at a time.
pub type ScrapeHook = Arc<dyn Fn(&Metrics) + Send + Sync>;
