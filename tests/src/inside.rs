//! What a running agent holds: memory, descriptors, entries in the kernel's maps.

use std::collections::HashSet;

use anyhow::{Context, Result, bail};
use aya::Pod;
use aya::maps::{HashMap, Map, MapData, MapInfo};
use rfsis_common::ack_gate::Guarded;
use rfsis_common::maps::{FlowKey, names};

use crate::agent::Agent;

impl Agent {
    /// Memory in use, KiB (VmRSS of proc_pid_status(5)).
    ///
    /// # Errors
    /// When the process is gone.
    pub fn resident_kib(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .context("no VmRSS in /proc/PID/status")?;
        let number = line.trim().trim_end_matches(" kB");
        number.parse().with_context(|| format!("VmRSS:{line}"))
    }

    /// Open descriptors.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.pid()))?.count())
    }

    /// Flows that the programs hand to its shadows: entries of `LIVE_FLOWS`.
    ///
    /// # Errors
    /// When it has no such map.
    pub fn live_flows(&self) -> Result<usize> {
        self.entries::<u8>(names::LIVE_FLOWS)
    }

    /// Flows that its ACK gate knows: entries of `GUARDED`.
    ///
    /// # Errors
    /// When it has no such map.
    pub fn guarded_flows(&self) -> Result<usize> {
        self.entries::<Guarded>(names::GUARDED)
    }

    /// While others change a map the kernel may show an entry twice.
    fn entries<V: Pod>(&self, name: &str) -> Result<usize> {
        let map = self.map::<V>(name).with_context(|| format!("map {name}"))?;
        Ok(map.keys().flatten().collect::<HashSet<_>>().len())
    }

    /// By the ids that its descriptors name (proc_pid_fdinfo(5)): maps of other agents have the same names.
    fn map<V: Pod>(&self, name: &str) -> Result<HashMap<MapData, FlowKey, V>> {
        for entry in std::fs::read_dir(format!("/proc/{}/fdinfo", self.pid()))? {
            let info = std::fs::read_to_string(entry?.path()).unwrap_or_default();
            let id = info.lines().find_map(|line| line.strip_prefix("map_id:"));
            let Some(id) = id else { continue };
            let id = id.trim().parse()?;
            if MapInfo::from_id(id)?.name_as_str() == Some(name) {
                let map = Map::HashMap(MapData::from_id(id)?);
                return Ok(HashMap::try_from(map)?);
            }
        }
        bail!("none of its descriptors is of such a map")
    }
}
