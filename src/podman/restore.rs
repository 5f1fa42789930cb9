//! A stream of bytes as a running container.

use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use hyper::Method;
use serde::{Deserialize, Serialize};

use super::client::Client;
use super::error::Result;
use super::id::ContainerId;
use super::request::{Call, Purpose, Query, Upload};

/// How a checkpoint is restored. The default is Podman's: everything that is in the archive, under
/// the container's own name, ID, addresses and ports, but no established TCP connections.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RestoreOptions {
    /// Keep CRIU's logs and statistics at the destination.
    pub keep: bool,
    /// Bring established TCP connections back; an archive that has some cannot be restored
    /// without this or [`RestoreOptions::tcp_close`].
    pub tcp_established: bool,
    /// Do not apply `rootfs-diff.tar` and `deleted.files`, also if they are in the archive.
    pub ignore_rootfs: bool,
    /// Do not make the volumes of the archive, but use those of their names that exist already.
    pub ignore_volumes: bool,
    /// Take another address if the container has a static one. Connections do not survive that.
    pub ignore_static_ip: bool,
    /// Likewise for its static MAC address.
    pub ignore_static_mac: bool,
    /// Restore under another name: the container gets a new ID and a new address, and cannot be
    /// checkpointed again (crun issue 1651).
    pub name: Option<String>,
    /// Publish these ports (`8080:80`, `127.0.0.1:53:53/udp`) in place of the archive's.
    pub publish_ports: Vec<String>,
    /// Have CRIU's statistics in the answer.
    pub print_stats: bool,
    /// Restore with connections closed rather than established (Podman 5.7 or newer).
    pub tcp_close: bool,
    /// Bring file locks back.
    pub file_locks: bool,
    /// Restore into this pod.
    pub pod: Option<String>,
}

impl RestoreOptions {
    fn query(&self) -> Query {
        let mut query = Query::new()
            .flag("keep", self.keep)
            .flag("tcpEstablished", self.tcp_established)
            .flag("ignoreRootFS", self.ignore_rootfs)
            .flag("ignoreVolumes", self.ignore_volumes)
            .flag("ignoreStaticIP", self.ignore_static_ip)
            .flag("ignoreStaticMAC", self.ignore_static_mac)
            .flag("printStats", self.print_stats)
            .flag("tcpClose", self.tcp_close)
            .flag("fileLocks", self.file_locks);
        if let Some(name) = &self.name {
            query = query.with("name", name);
        }
        if !self.publish_ports.is_empty() {
            // One value, blanks in between.
            query = query.with("publishPorts", &self.publish_ports.join(" "));
        }
        if let Some(pod) = &self.pod {
            query = query.with("pod", pod);
        }
        query
    }
}

/// A container that runs again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// Its ID; the old one unless it was given another name.
    pub id: ContainerId,
    /// How long conmon, the OCI runtime and CRIU took together, if statistics were asked for.
    pub runtime_restore: Option<Duration>,
    /// What CRIU says, if statistics were asked for.
    pub criu: Option<CriuStatistics>,
}

/// CRIU's `stats-restore` (criu/images/stats.proto, `restore_stats_entry`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CriuStatistics {
    /// To fork the processes.
    pub forking: Duration,
    /// For the restore as a whole, from CRIU's start to the processes' first instruction.
    pub restore: Duration,
    /// Memory pages written.
    pub pages_restored: u64,
    /// Pages compared with those of a parent process, to keep them shared.
    pub pages_compared: u64,
    /// Pages that turned out to be shared.
    pub pages_skipped_cow: u64,
}

/// Podman's report; the times are microseconds.
#[derive(Debug, Deserialize)]
pub(super) struct Report {
    #[serde(rename = "Id")]
    id: ContainerId,
    #[serde(default)]
    runtime_restore_duration: Option<u64>,
    #[serde(default)]
    criu_statistics: Option<ReportedStatistics>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ReportedStatistics {
    forking_time: u64,
    restore_time: u64,
    pages_restored: u64,
    pages_compared: u64,
    pages_skipped_cow: u64,
}

impl From<Report> for Restored {
    fn from(report: Report) -> Restored {
        Restored {
            id: report.id,
            // Zero stands for "not asked for".
            runtime_restore: report
                .runtime_restore_duration
                .filter(|micros| *micros != 0)
                .map(Duration::from_micros),
            criu: report.criu_statistics.map(|s| CriuStatistics {
                forking: Duration::from_micros(s.forking_time),
                restore: Duration::from_micros(s.restore_time),
                pages_restored: s.pages_restored,
                pages_compared: s.pages_compared,
                pages_skipped_cow: s.pages_skipped_cow,
            }),
        }
    }
}

impl Client {
    /// Restores a container from an archive that [`Client::checkpoint`] made, on any host.
    ///
    /// Podman writes the archive to its temporary directory as it comes and begins the restore
    /// after its end; this returns when the container runs. Podman extracts every entry, later
    /// ones over earlier ones, so `rootfs-diff.tar` and `deleted.files` may be put *in front of*
    /// an archive that was made with [`CheckpointOptions::ignore_rootfs`](super::CheckpointOptions)
    /// (two tar entries without an end-of-archive mark): the diff is unpacked first, then the
    /// paths of `deleted.files` are removed. What follows the archive's own end is not read.
    ///
    /// # Errors
    /// Those of [`super::Refusal`]. [`super::Error::Archive`] if the stream fails; Podman has made nothing
    /// then. After [`super::Refusal::AddressOutside`], [`super::Refusal::AddressInUse`],
    /// [`super::Refusal::PortInUse`] and [`super::Refusal::Runtime`] a container of the ID is left
    /// behind in the state `created` and has to be removed. After a failure of the runtime
    /// Podman's service goes on listening on the published ports, also when the container is
    /// removed: see [`Client::free_leaked_ports`].
    pub async fn restore<S, E>(&self, archive: S, options: &RestoreOptions) -> Result<Restored>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let call = Call {
            purpose: Purpose::new("restore", "the container"),
            method: Method::POST,
            // With import=true the name is not looked at, but there has to be one.
            path: "/containers/import/restore",
            query: options.query().with("import", "true"),
            wait: self.timeouts.restore,
        };
        let answer = self.socket.send(call, Upload::archive(archive)).await?;
        Ok(answer.json::<Report>().await?.into())
    }

    /// Makes Podman's service let go of the ports that a failed restore has left it with. Returns
    /// whether `is_free` ([`PublishedPort::is_free`](super::PublishedPort::is_free)) came true.
    ///
    /// The leaked sockets are closed when Go's garbage collector finds them, which in an idle
    /// service takes two minutes (seen: 121 s). Requests make garbage: after thirty of these
    /// they were gone, in less than a second. Remove the container first.
    ///
    /// # Errors
    /// When Podman cannot be asked.
    pub async fn free_leaked_ports(&self, mut is_free: impl FnMut() -> bool) -> Result<bool> {
        const REQUESTS: usize = 300;
        for _ in 0..REQUESTS {
            if is_free() {
                return Ok(true);
            }
            self.host().await?;
        }
        Ok(is_free())
    }

    /// Restores a container in place, from the checkpoint that Podman kept when it was made
    /// without `leave_running`.
    ///
    /// # Errors
    /// As for [`Client::restore`]; a container with `--rm` is gone after its checkpoint.
    pub async fn restore_in_place(
        &self,
        id: &ContainerId,
        options: &RestoreOptions,
    ) -> Result<Restored> {
        let path = format!("/containers/{id}/restore");
        let call = Call {
            purpose: Purpose::new("restore", format!("container {}", id.short())),
            method: Method::POST,
            path: &path,
            query: options.query(),
            wait: self.timeouts.restore,
        };
        let answer = self.socket.send(call, Upload::empty()).await?;
        Ok(answer.json::<Report>().await?.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Podman 5.8.6 answered.
    #[test]
    fn reads_the_report() {
        let report: Report = serde_json::from_str(
            r#"{"Id":"8f250b7cd154ca4346cdf98d040b7f74e07f20d9cecf076e289284bbfe58c305",
            "runtime_restore_duration":161398,"criu_statistics":{"pages_compared":9,
            "pages_skipped_cow":3,"forking_time":310,"restore_time":91276,"pages_restored":31}}"#,
        )
        .unwrap();
        let restored = Restored::from(report);
        assert_eq!(restored.id.short(), "8f250b7cd154");
        assert_eq!(
            restored.runtime_restore,
            Some(Duration::from_micros(161_398))
        );
        let criu = restored.criu.unwrap();
        assert_eq!(criu.restore, Duration::from_micros(91_276));
        assert_eq!(criu.pages_restored, 31);
    }

    #[test]
    fn reads_a_report_without_statistics() {
        let report: Report = serde_json::from_str(
            r#"{"Id":"8f250b7cd154ca4346cdf98d040b7f74e07f20d9cecf076e289284bbfe58c305",
            "runtime_restore_duration":0,"criu_statistics":null}"#,
        )
        .unwrap();
        let restored = Restored::from(report);
        assert_eq!((restored.runtime_restore, restored.criu), (None, None));
    }

    #[test]
    fn writes_podmans_keys() {
        let options = RestoreOptions {
            keep: true,
            tcp_established: true,
            ignore_rootfs: true,
            ignore_volumes: true,
            ignore_static_ip: true,
            ignore_static_mac: true,
            name: Some("other".into()),
            publish_ports: vec!["8080:80".into(), "53:53/udp".into()],
            print_stats: true,
            tcp_close: true,
            file_locks: true,
            pod: Some("p".into()),
        };
        assert_eq!(
            options.query().as_str(),
            "?keep=true&tcpEstablished=true&ignoreRootFS=true&ignoreVolumes=true\
             &ignoreStaticIP=true&ignoreStaticMAC=true&printStats=true&tcpClose=true\
             &fileLocks=true&name=other&publishPorts=8080%3A80%2053%3A53%2Fudp&pod=p"
        );
    }
}
