//! What the keys of a config file mean, and which values they take.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::fields::{self, KeyFileError, MIN_KEY_BYTES};
use super::reader::{Field, Reader, Section};
use super::yaml::{self, Node, Value};
use super::{
    ClusterKey, Config, ConfigErrors, HeartbeatConfig, MirrorConfig, Protect, Protocol, Service,
    ShadowConfig, SyncConfig, Tap,
};
use crate::bpf::XdpMode;
use crate::handler::HandlerKind;
use rfsis_common::mirror::MirrorEgress;

const DEFAULT_SYNC_PORT: u16 = 9501;
const DEFAULT_UDP_REPLAY: Duration = Duration::from_secs(1);
const DEFAULT_STARTUP_GRACE: Duration = Duration::from_secs(3);
const INTERFACE_EXPECTED: &str = "an interface name of 1 to 15 characters like eth0";
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Reads the whole file.
pub(super) fn config(text: &str, file: &Path) -> Result<Config, ConfigErrors> {
    let tree = yaml::parse(text);
    let mut reader = Reader {
        file,
        errors: Vec::new(),
    };
    let config = match &tree {
        Ok(root) => reader.config(root),
        Err(error) => {
            reader.error(error.line, "YAML", &*error.found, "valid YAML");
            None
        }
    };
    match config {
        Some(config) if reader.errors.is_empty() => Ok(config),
        _ => {
            // Stable: errors of one line stay in the order of the checks.
            reader.errors.sort_by_key(|error| error.line);
            Err(ConfigErrors(reader.errors))
        }
    }
}

impl<'a> Reader<'a> {
    fn config(&mut self, root: &'a Node) -> Option<Config> {
        let root = Field {
            path: String::new(),
            node: root,
        };
        let root = self.section(
            root,
            &[
                "cluster",
                "interface",
                "xdp",
                "virtual_ip",
                "nodes",
                "key",
                "key_file",
                "tap",
                "sync_interface",
                "mirror_egress",
                "protect",
                "protect_timeout",
                "sync_port",
                "udp_replay",
                "preempt",
                "heartbeat",
                "services",
                "shadow",
                "metrics",
                "control",
            ],
        )?;
        let cluster = self.required(&root, "cluster", "a name of 1 to 64 characters", |text| {
            let fits = (1..=64).contains(&text.chars().count());
            (fits && !text.chars().any(char::is_control)).then(|| text.to_owned())
        });
        let interface = self.required(&root, "interface", INTERFACE_EXPECTED, fields::interface);
        let xdp = self.optional(
            &root,
            "xdp",
            None,
            "auto, native or off",
            |text| match text {
                "auto" => Some(None),
                "native" => Some(Some(XdpMode::Native)),
                "off" => Some(Some(XdpMode::Tc)),
                _ => None,
            },
        );
        let virtual_ip = self.required(
            &root,
            "virtual_ip",
            "an IPv4 host address with its prefix length (1 to 30) like 192.168.1.100/24",
            fields::virtual_ip,
        );
        let nodes = self.nodes(&root, virtual_ip);
        let key = self.key(&root);
        let heartbeat = self.heartbeat(&root);
        let protect = self.protect(&root, heartbeat.map(|heartbeat| heartbeat.takeover_time()));
        let tap = self.tap(&root, interface.as_deref(), protect);
        let udp_replay = self.optional(
            &root,
            "udp_replay",
            DEFAULT_UDP_REPLAY,
            "a duration like 1s, at most 10s, or 0",
            duration_in(Duration::ZERO, Duration::from_secs(10)),
        );
        let preempt = self.optional(
            &root,
            "preempt",
            None,
            "a duration like 1m, from 1s to 24h; without the key it is never done",
            |text| duration_in(Duration::from_secs(1), DAY)(text).map(Some),
        );
        let services = self.services(&root);
        let shadow = self.shadow(&root);
        let metrics = self.metrics(&root);
        let control = self.optional(
            &root,
            "control",
            PathBuf::from("/run/rfsis/agent.sock"),
            // sockaddr_un holds 108 bytes with the terminating zero, unix(7).
            "an absolute path of at most 107 bytes",
            |text| (text.starts_with('/') && text.len() <= 107).then(|| PathBuf::from(text)),
        );
        let (virtual_ip, prefix_len) = virtual_ip?;
        Some(Config {
            cluster: cluster?,
            interface: interface?,
            xdp: xdp?,
            virtual_ip,
            prefix_len,
            nodes: nodes?,
            key: key?,
            tap: tap?,
            protect: protect?,
            udp_replay: udp_replay?,
            preempt: preempt?,
            heartbeat: heartbeat?,
            services: services?,
            shadow: shadow?,
            metrics: metrics?,
            control: control?,
        })
    }

    /// Protection with what belongs to it.
    fn protect(&mut self, root: &Section<'a>, takeover_time: Option<Duration>) -> Option<Protect> {
        let syncs = self.optional(root, "protect", true, "async or sync", |text| match text {
            "async" => Some(false),
            "sync" => Some(true),
            _ => None,
        })?;
        if !syncs {
            self.only_beside("protect: sync", root, &["protect_timeout", "sync_port"]);
            return Some(Protect::Async);
        }
        let timeout = self.optional(
            root,
            "protect_timeout",
            takeover_time,
            "a duration like 30ms, from 1ms to 60s",
            |text| {
                let limits = duration_in(Duration::from_millis(1), Duration::from_secs(60));
                limits(text).map(Some)
            },
        );
        let expected = "a port from 1 to 65535";
        let port = self.optional(root, "sync_port", DEFAULT_SYNC_PORT, expected, |text| {
            fields::whole(text).filter(|port| *port != 0)
        });
        Some(Protect::Sync(SyncConfig {
            timeout: timeout??,
            port: port?,
        }))
    }

    /// The tap with what belongs to it. `interface` is the one that carries the VIP.
    fn tap(
        &mut self,
        root: &Section<'a>,
        interface: Option<&str>,
        protect: Option<Protect>,
    ) -> Option<Tap> {
        let mirrors = self.optional(root, "tap", true, "lan or mirror", |text| match text {
            "lan" => Some(false),
            "mirror" => Some(true),
            _ => None,
        })?;
        if !mirrors {
            self.only_beside("tap: mirror", root, &["sync_interface", "mirror_egress"]);
            return Some(Tap::Lan);
        }
        let sync_interface = match root.get("sync_interface") {
            None => None,
            Some(field) => {
                let name = self.value(&field, INTERFACE_EXPECTED, fields::interface)?;
                if Some(&*name) == interface {
                    self.mismatch(&field, "another interface than the one with the virtual IP");
                    return None;
                }
                Some(name)
            }
        };
        Some(Tap::Mirror(MirrorConfig {
            sync_interface,
            egress: self.mirror_egress(root, protect)?,
        }))
    }

    /// Keys that mean nothing without `choice`, which was not made.
    fn only_beside(&mut self, choice: &str, root: &Section<'a>, keys: &[&str]) {
        for field in keys.iter().filter_map(|key| root.get(key)) {
            self.mismatch(&field, format!("this key only beside {choice}"));
        }
    }

    fn mirror_egress(
        &mut self,
        root: &Section<'a>,
        protect: Option<Protect>,
    ) -> Option<MirrorEgress> {
        let default = match protect {
            Some(Protect::Sync(_)) => MirrorEgress::Handshake,
            Some(Protect::Async) | None => MirrorEgress::Full,
        };
        let words = MirrorEgress::ALL.map(MirrorEgress::as_str).join(" or ");
        // Headers alone would do for some, but `bpf_clone_redirect` copies all of a frame or nothing.
        let expected = format!("{words} (a frame is copied whole or not at all)");
        self.optional(root, "mirror_egress", default, &expected, |text| {
            MirrorEgress::ALL
                .into_iter()
                .find(|egress| egress.as_str() == text)
        })
    }

    fn unsupported(&mut self, field: &Field, expected: String) {
        let found = match &field.node.value {
            Value::Scalar(text) => format!("{text:?}, which is not supported yet"),
            _ => "what is not supported yet".to_owned(),
        };
        self.error(field.node.line, &*field.path, found, expected);
    }

    fn nodes(
        &mut self,
        root: &Section<'a>,
        virtual_ip: Option<(Ipv4Addr, u8)>,
    ) -> Option<[Ipv4Addr; 2]> {
        let expected = "the addresses of exactly two nodes like [192.168.1.1, 192.168.1.2]";
        let Some(field) = root.get("nodes") else {
            self.missing(root, "nodes", expected);
            return None;
        };
        let Value::List(items) = &field.node.value else {
            self.mismatch(&field, expected);
            return None;
        };
        let mut nodes = Vec::new();
        for (index, node) in items.iter().enumerate() {
            let item = Field {
                path: format!("nodes[{index}]"),
                node,
            };
            let expected = "an IPv4 address like 192.168.1.1";
            let Some(address) = self.value(&item, expected, |text| text.parse::<Ipv4Addr>().ok())
            else {
                continue;
            };
            if nodes.contains(&address) {
                self.mismatch(&item, "two different nodes");
            } else if let Some((vip, prefix_len)) = virtual_ip {
                if address == vip {
                    self.mismatch(&item, "the node's own address, not the virtual IP");
                } else if !fields::is_host(address, vip, prefix_len) {
                    self.mismatch(
                        &item,
                        format!(
                            "a host address in the subnet of the virtual IP {vip}/{prefix_len}"
                        ),
                    );
                }
            }
            nodes.push(address);
        }
        if items.len() != 2 {
            let found = match items.len() {
                1 => "1 node".to_owned(),
                count => format!("{count} nodes"),
            };
            self.error(field.node.line, field.path, found, expected);
        }
        nodes.try_into().ok()
    }

    fn key(&mut self, root: &Section<'a>) -> Option<ClusterKey> {
        let expected = "key_file (or, for demos, key) with 32 bytes or more";
        match (root.get("key"), root.get("key_file")) {
            (None, None) => {
                self.missing(root, "key_file", expected);
                None
            }
            (Some(_), Some(file)) => {
                let found = "key and key_file together";
                self.error(file.node.line, file.path, found, "exactly one of the two");
                None
            }
            // Not by `value`: an error must not print the key.
            (Some(field), None) => match &field.node.value {
                Value::Scalar(text) => self.key_of(&field, text.clone().into_bytes()),
                _ => {
                    self.mismatch(&field, expected);
                    None
                }
            },
            (None, Some(field)) => {
                let path = self.value(&field, "the path of a file", |text| {
                    (!text.is_empty()).then(|| PathBuf::from(text))
                })?;
                let path = self.file.parent().unwrap_or(Path::new("")).join(path);
                match fields::key_file(&path) {
                    Ok(key) => self.key_of(&field, key),
                    Err(KeyFileError::Exposed(mode)) => {
                        let found = format!("{} with mode {mode:04o}", path.display());
                        let expected = format!(
                            "a key that only its owner can read: chmod 600 {}",
                            path.display()
                        );
                        self.error(field.node.line, field.path, found, expected);
                        None
                    }
                    Err(KeyFileError::Unreadable(error)) => {
                        let found = format!("{}: {error}", path.display());
                        let expected = "a readable regular file of 32 to 4096 bytes, mode 0600";
                        self.error(field.node.line, field.path, found, expected);
                        None
                    }
                }
            }
        }
    }

    fn key_of(&mut self, field: &Field, key: Vec<u8>) -> Option<ClusterKey> {
        if key.len() < MIN_KEY_BYTES {
            let found = format!("a key of {} bytes", key.len());
            self.error(field.node.line, &*field.path, found, "32 bytes or more");
            return None;
        }
        Some(ClusterKey(key))
    }

    fn heartbeat(&mut self, root: &Section<'a>) -> Option<HeartbeatConfig> {
        let expected = "a map like { interval: 10ms, missed: 3 }";
        let Some(field) = root.get("heartbeat") else {
            self.missing(root, "heartbeat", expected);
            return None;
        };
        let section = self.section(field, &["interval", "missed", "lease", "startup_grace"])?;
        let interval = self.required(
            &section,
            "interval",
            "a duration like 10ms, from 1ms to 10s",
            duration_in(Duration::from_millis(1), Duration::from_secs(10)),
        );
        let missed = self.required(&section, "missed", "a number from 2 to 100", |text| {
            fields::whole::<u32>(text).filter(|missed| (2..=100).contains(missed))
        });
        let lease = self.optional(&section, "lease", None, "a duration like 25ms", |text| {
            duration_in(Duration::from_millis(1), DAY)(text).map(Some)
        });
        let startup_grace = self.optional(
            &section,
            "startup_grace",
            None,
            "a duration like 3s, at most 1day",
            |text| duration_in(Duration::ZERO, DAY)(text).map(Some),
        );
        let (interval, missed) = (interval?, missed?);
        let takeover_time = interval * missed;
        let shown = humantime::format_duration(takeover_time);
        if let (Some(Some(lease)), Some(field)) = (lease, section.get("lease"))
            && (lease <= interval || lease >= takeover_time)
        {
            let interval = humantime::format_duration(interval);
            self.mismatch(
                &field,
                format!("more than the interval {interval}, less than the takeover time {shown} (interval × missed)"),
            );
        }
        if let (Some(Some(grace)), Some(field)) = (startup_grace, section.get("startup_grace"))
            && grace < takeover_time
        {
            self.mismatch(
                &field,
                format!("the takeover time {shown} (interval × missed) or more"),
            );
        }
        Some(HeartbeatConfig {
            interval,
            missed,
            lease: lease?.unwrap_or(takeover_time - interval / 2),
            startup_grace: startup_grace?.unwrap_or(DEFAULT_STARTUP_GRACE.max(takeover_time)),
        })
    }

    fn services(&mut self, root: &Section<'a>) -> Option<Vec<Service>> {
        let expected =
            "a list with at least one service like { name: echo, listen: tcp/7, handler: echo }";
        let Some(field) = root.get("services") else {
            self.missing(root, "services", expected);
            return None;
        };
        let items = match &field.node.value {
            Value::List(items) if !items.is_empty() => items,
            Value::List(_) => {
                self.error(field.node.line, field.path, "an empty list", expected);
                return None;
            }
            _ => {
                self.mismatch(&field, expected);
                return None;
            }
        };
        let mut names: HashMap<String, usize> = HashMap::new();
        let mut ports: HashMap<(Protocol, u16), usize> = HashMap::new();
        let mut services = Vec::new();
        for (index, node) in items.iter().enumerate() {
            let field = Field {
                path: format!("services[{index}]"),
                node,
            };
            services.extend(self.service(field, &mut names, &mut ports));
        }
        Some(services)
    }

    /// One service. `names` and `ports` hold the lines of those before it.
    fn service(
        &mut self,
        field: Field<'a>,
        names: &mut HashMap<String, usize>,
        ports: &mut HashMap<(Protocol, u16), usize>,
    ) -> Option<Service> {
        let section = self.section(field, &["name", "listen", "handler", "upstream"])?;
        let name = self.required(
            &section,
            "name",
            "a name of 1 to 64 characters of a-z, 0-9 and -",
            |text| is_service_name(text).then(|| text.to_owned()),
        );
        let listen = self.required(
            &section,
            "listen",
            "tcp/PORT or udp/PORT with a port from 1 to 65535",
            fields::listen,
        );
        if let (Some(name), Some(field)) = (&name, section.get("name")) {
            self.unique(names, name.clone(), &field);
        }
        if let (Some(listen), Some(field)) = (listen, section.get("listen")) {
            self.unique(ports, listen, &field);
        }
        let handler = self.handler(&section);
        let (protocol, port) = listen?;
        Some(Service {
            name: name?,
            protocol,
            port,
            handler: handler?,
        })
    }

    fn handler(&mut self, section: &Section<'a>) -> Option<HandlerKind> {
        let kinds = HandlerKind::ALL.map(HandlerKind::as_str).join(", ");
        match (section.get("handler"), section.get("upstream")) {
            (None, None) => {
                self.missing(section, "handler", format!("one of {kinds}"));
                None
            }
            (Some(_), Some(upstream)) => {
                let found = "handler and upstream together";
                self.error(
                    upstream.node.line,
                    upstream.path,
                    found,
                    "exactly one of the two",
                );
                None
            }
            (None, Some(upstream)) => {
                self.unsupported(&upstream, format!("handler: one of {kinds}"));
                None
            }
            (Some(handler), None) => self.value(&handler, &format!("one of {kinds}"), |text| {
                HandlerKind::ALL
                    .into_iter()
                    .find(|kind| kind.as_str() == text)
            }),
        }
    }

    fn shadow(&mut self, root: &Section<'a>) -> Option<ShadowConfig> {
        let none = Section {
            path: "shadow".into(),
            line: root.line,
            entries: &[],
        };
        let section = match root.get("shadow") {
            Some(field) => self.section(
                field,
                &["max_flows", "max_bytes", "idle_timeout", "ring_bytes"],
            )?,
            None => none,
        };
        let max_flows = self.optional(
            &section,
            "max_flows",
            20_000,
            "a number from 1 to 1000000",
            |text| fields::whole::<usize>(text).filter(|flows| (1..=1_000_000).contains(flows)),
        );
        let max_bytes = self.optional(
            &section,
            "max_bytes",
            256 << 20,
            "a size like 256MiB, from 1MiB to 1024GiB",
            |text| {
                let bytes = fields::size(text)?;
                ((1 << 20)..=(1 << 40)).contains(&bytes).then_some(bytes)
            },
        );
        let idle_timeout = self.optional(
            &section,
            "idle_timeout",
            Duration::from_secs(2 * 3600),
            "a duration like 2h, from 1s to 365days",
            duration_in(Duration::from_secs(1), DAY * 365),
        );
        let ring_bytes = self.optional(
            &section,
            "ring_bytes",
            32 << 20,
            "a size that is a power of two like 32MiB, from 64KiB to 1GiB",
            |text| {
                // BPF_MAP_TYPE_RINGBUF: kernel/bpf/ringbuf.c wants a power of two of whole pages.
                let bytes = u32::try_from(fields::size(text)?).ok()?;
                (bytes.is_power_of_two() && ((64 << 10)..=(1 << 30)).contains(&bytes))
                    .then_some(bytes)
            },
        );
        Some(ShadowConfig {
            max_flows: max_flows?,
            max_bytes: usize::try_from(max_bytes?).unwrap_or(usize::MAX),
            idle_timeout: idle_timeout?,
            ring_bytes: ring_bytes?,
        })
    }

    fn metrics(&mut self, root: &Section<'a>) -> Option<SocketAddr> {
        let Some(field) = root.get("metrics") else {
            return Some(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 9500)));
        };
        let section = self.section(field, &["listen"])?;
        let expected = "an address and a port like 0.0.0.0:9500";
        self.required(&section, "listen", expected, |text| {
            text.parse::<SocketAddr>()
                .ok()
                .filter(|address| address.port() != 0)
        })
    }
}

fn duration_in(least: Duration, most: Duration) -> impl Fn(&str) -> Option<Duration> {
    move |text| fields::duration(text).filter(|duration| (least..=most).contains(duration))
}

fn is_service_name(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}
