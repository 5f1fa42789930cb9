//! The hops of this host: one small file each, so that every livemig process sees the same ones.
//!
//! Steering puts a hop's number into the marks of live connections, and a migration may share the
//! hop that another one made. So numbers are given out under a file lock, a hop is found again by
//! its peer, and each record carries the set of those that use it.
//!
//! The records lie below `/run`, which a reboot empties as it removes the interfaces.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::address::Ends;
use super::error::{Error, Result, file};
use super::key::PublicKey;
use super::process::Process;
use super::{Backend, HopId, Proposal, interface};

/// What has to be known to remove a hop. It is fixed when the number is given out, before anything
/// exists: it belongs into the journal before the hop is opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HopSpec {
    /// Its number.
    pub hop: HopId,
    /// Tells this hop from an earlier or a later one of the same number.
    pub made: u64,
    /// Its network interface.
    pub interface: String,
    /// What drives the interface.
    pub backend: Backend,
    /// The configuration socket of a userspace device.
    pub socket: PathBuf,
}

/// Where the other end is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// The peer's key.
    pub peer_key: PublicKey,
    /// Where its packets go.
    pub endpoint: SocketAddr,
    /// The IPv4 addresses of the two ends.
    pub v4: Option<Ends>,
    /// The IPv6 addresses of the two ends.
    pub v6: Option<Ends>,
    /// The largest packet that the interface takes, in bytes.
    pub mtu: u16,
    /// When this host was started, in seconds since 1970 by its clock as it was when the peer was let in. What
    /// it is now differs from that by how far the clock was set.
    #[serde(default)]
    pub host_started: Option<u64>,
}

/// The record of a hop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hop {
    /// What has to be known to remove it.
    pub spec: HopSpec,
    /// The other host: the text of its fingerprint.
    pub peer: String,
    /// Who needs the hop: migrations and containers, by names that their owners choose.
    pub users: BTreeSet<String>,
    /// Our side of the exchange, once the interface exists.
    pub proposal: Option<Proposal>,
    /// The other end, once it is known.
    pub connection: Option<Connection>,
    /// The process of a userspace device.
    pub device: Option<Process>,
    /// The processes that took the hop before it was open. While one of them runs, its number is
    /// not free.
    pub owners: Vec<Process>,
}

impl Hop {
    /// Whether the hop is nothing but a number that a dead process took.
    fn is_abandoned(&self) -> bool {
        self.proposal.is_none()
            && !self.owners.iter().any(Process::is_running)
            && !interface::exists(&self.spec.interface)
    }

    /// Whether its interface was there once and is gone.
    fn is_gone(&self) -> bool {
        self.proposal.is_some() && !interface::exists(&self.spec.interface)
    }
}

/// How often a lock that another process holds is tried again.
const POLL: Duration = Duration::from_millis(10);
/// Records are edited in well under a millisecond: whoever holds this lock for longer hangs.
const RECORD_LOCK: Duration = Duration::from_secs(5);
/// A record is about a kilobyte and its list of networks is bounded.
const RECORD_SIZE: u64 = 1 << 20;

/// The records of the hops of this host.
#[derive(Debug, Clone)]
pub struct Registry {
    directory: PathBuf,
}

impl Registry {
    /// The registry in this directory, usually `/run/livemig/hops`. Nothing is touched yet.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
        }
    }

    /// The directory of the records.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The hop to `peer` with `user` among its users, and whether it was made just now.
    ///
    /// A new hop is a number and a record; [`Tunnels::open`](super::Tunnels::open) makes the rest.
    /// Its number is the smallest that no record and no interface has.
    ///
    /// # Errors
    /// [`Error::Exhausted`] if there is no number left, and those of files.
    pub fn acquire(
        &self,
        peer: &str,
        user: &str,
        backend: Backend,
        uapi_directory: &Path,
    ) -> Result<(Hop, bool)> {
        let _lock = self.lock()?;
        let hops = self.read_all()?;
        if let Some(mut hop) = hops.iter().find(|hop| hop.peer == peer).cloned() {
            let mut changed = hop.users.insert(user.to_owned());
            if hop.proposal.is_none() {
                hop.owners.retain(Process::is_running);
                hop.owners.extend(Process::current());
                hop.owners.dedup();
                changed = true;
            }
            if changed {
                self.write(&hop)?;
            }
            return Ok((hop, false));
        }
        let hop = self.free_number(&hops)?;
        let interface = hop.interface();
        let made = getrandom::u64().map_err(Error::Random)?;
        let hop = Hop {
            spec: HopSpec {
                hop,
                made,
                socket: uapi_directory.join(format!("{interface}.sock")),
                interface,
                backend,
            },
            peer: peer.to_owned(),
            users: BTreeSet::from([user.to_owned()]),
            proposal: None,
            connection: None,
            device: None,
            owners: Process::current().into_iter().collect(),
        };
        self.write(&hop)?;
        Ok((hop, true))
    }

    /// A number that nothing uses. Only when there is none left does a hop give up its number that
    /// had an interface once: connections may still carry it in their marks.
    fn free_number(&self, hops: &[Hop]) -> Result<HopId> {
        let of = |hop: HopId| hops.iter().find(|record| record.spec.hop == hop);
        HopId::all()
            .find(|hop| match of(*hop) {
                Some(record) => record.is_abandoned(),
                None => !interface::exists(&hop.interface()),
            })
            .or_else(|| HopId::all().find(|hop| of(*hop).is_some_and(Hop::is_gone)))
            .ok_or(Error::Exhausted)
    }

    /// Takes `user` off the hop; says whether it was the last. The hop itself stays until
    /// [`Tunnels::down`](super::Tunnels::down). A hop that is gone has no users.
    ///
    /// # Errors
    /// Those of files.
    pub fn release(&self, hop: HopId, user: &str) -> Result<bool> {
        let _lock = self.lock()?;
        let Some(mut record) = self.read(hop)? else {
            return Ok(true);
        };
        if record.users.remove(user) {
            self.write(&record)?;
        }
        Ok(record.users.is_empty())
    }

    /// Takes `user` off every hop, which is how to undo an acquisition that may or may not have
    /// happened. Returns the hops that have no user left because of it.
    ///
    /// # Errors
    /// Those of files.
    pub fn forget(&self, user: &str) -> Result<Vec<Hop>> {
        let _lock = self.lock()?;
        let mut last = Vec::new();
        for mut record in self.read_all()? {
            if record.users.remove(user) {
                self.write(&record)?;
                if record.users.is_empty() {
                    last.push(record);
                }
            }
        }
        Ok(last)
    }

    /// The hop to `peer`.
    ///
    /// # Errors
    /// Those of files.
    pub fn find(&self, peer: &str) -> Result<Option<Hop>> {
        Ok(self.list()?.into_iter().find(|hop| hop.peer == peer))
    }

    /// The hop with this number.
    ///
    /// # Errors
    /// Those of files.
    pub fn get(&self, hop: HopId) -> Result<Option<Hop>> {
        self.read(hop)
    }

    /// All hops, by number.
    ///
    /// # Errors
    /// Those of files.
    pub fn list(&self) -> Result<Vec<Hop>> {
        self.read_all()
    }

    /// Takes a hop out of reach of [`Registry::acquire`] so that it can be removed: its peer, if it
    /// is needed again meanwhile, gets another one. With `unless_used`, a hop that has users stays.
    /// Returns the record that is to be removed; none if there is no such hop or it stays.
    pub(super) fn retire(&self, spec: &HopSpec, unless_used: bool) -> Result<Option<Hop>> {
        let _lock = self.lock()?;
        let Some(mut record) = self.read(spec.hop)? else {
            return Ok(None);
        };
        if record.spec.made != spec.made || (unless_used && !record.users.is_empty()) {
            return Ok(None);
        }
        record.peer.clear();
        record.users.clear();
        self.write(&record)?;
        Ok(Some(record))
    }

    /// Changes a record, if it exists, and returns what it is then.
    pub(super) fn update(&self, hop: HopId, change: impl FnOnce(&mut Hop)) -> Result<Hop> {
        let _lock = self.lock()?;
        let mut record = self.read(hop)?.ok_or(Error::Unknown(hop))?;
        change(&mut record);
        self.write(&record)?;
        Ok(record)
    }

    /// Removes a record; without one it does nothing.
    pub(super) fn remove(&self, hop: HopId) -> Result<()> {
        let path = self.path(hop);
        match std::fs::remove_file(&path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(file("remove", &path)(error)),
        }
    }

    fn path(&self, hop: HopId) -> PathBuf {
        self.directory.join(format!("{hop}.json"))
    }

    /// Where the process of a hop's userspace device writes why it ended.
    pub(super) fn log_path(&self, hop: HopId) -> PathBuf {
        self.directory.join(format!("{hop}.log"))
    }

    fn read(&self, hop: HopId) -> Result<Option<Hop>> {
        let path = self.path(hop);
        let mut text = String::new();
        match File::open(&path).and_then(|f| f.take(RECORD_SIZE).read_to_string(&mut text)) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(file("read", &path)(error)),
        }
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|source| Error::Record { path, source })
    }

    fn read_all(&self) -> Result<Vec<Hop>> {
        let entries = match std::fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(file("list", &self.directory)(error)),
        };
        let mut numbers: Vec<HopId> = entries
            .filter_map(|entry| {
                let name = entry.ok()?.file_name();
                let number: u8 = name.to_str()?.strip_suffix(".json")?.parse().ok()?;
                HopId::try_from(number).ok()
            })
            .collect();
        numbers.sort();
        let mut hops = Vec::with_capacity(numbers.len());
        for number in numbers {
            // One that was removed since is simply not there any more.
            hops.extend(self.read(number)?);
        }
        Ok(hops)
    }

    /// Writes a record so that a reader sees the old one or the new one, never a half.
    fn write(&self, hop: &Hop) -> Result<()> {
        let path = self.path(hop.spec.hop);
        let new = self.directory.join(format!("{}.json.new", hop.spec.hop));
        let text = serde_json::to_vec_pretty(hop).map_err(|source| Error::Record {
            path: path.clone(),
            source,
        })?;
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut f| f.write_all(&text))
            .map_err(file("write", &new))?;
        std::fs::rename(&new, &path).map_err(file("write", &path))
    }

    /// The lock under which records are changed.
    fn lock(&self) -> Result<File> {
        let (path, lock) = self.lock_file("records.lock")?;
        let deadline = Instant::now() + RECORD_LOCK;
        while !try_lock(&lock, &path)? {
            if Instant::now() >= deadline {
                return Err(Error::Locked {
                    path,
                    waited: RECORD_LOCK,
                });
            }
            std::thread::sleep(POLL);
        }
        Ok(lock)
    }

    /// The lock under which interfaces are made, connected and removed: one at a time on a host, so
    /// that neither ports nor addresses are chosen twice. It is held until the file is dropped.
    pub(super) async fn lock_interfaces(&self, patience: Duration) -> Result<File> {
        let (path, lock) = self.lock_file("interfaces.lock")?;
        let deadline = Instant::now() + patience;
        while !try_lock(&lock, &path)? {
            if Instant::now() >= deadline {
                return Err(Error::Locked {
                    path,
                    waited: patience,
                });
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(lock)
    }

    fn lock_file(&self, name: &str) -> Result<(PathBuf, File)> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .map_err(file("create", &self.directory))?;
        let path = self.directory.join(name);
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(file("open", &path))?;
        Ok((path, lock))
    }
}

fn try_lock(lock: &File, path: &Path) -> Result<bool> {
    match flock(lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(file("lock", path)(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> (tempfile::TempDir, Registry) {
        let directory = tempfile::tempdir().unwrap();
        let registry = Registry::new(directory.path().join("hops"));
        (directory, registry)
    }

    fn acquire(registry: &Registry, peer: &str, user: &str) -> (Hop, bool) {
        registry
            .acquire(peer, user, Backend::Userspace, Path::new("/run/none"))
            .unwrap()
    }

    #[test]
    fn one_hop_per_peer_with_all_its_users() {
        let (_directory, registry) = registry();
        let (first, created) = acquire(&registry, "sha256:aa", "migration 1");
        assert!(created);
        let (second, created) = acquire(&registry, "sha256:aa", "migration 2");
        assert!(!created);
        assert_eq!(first.spec, second.spec);
        let (other, created) = acquire(&registry, "sha256:bb", "migration 2");
        assert!(created);
        assert_ne!(other.spec.hop, first.spec.hop);

        assert_eq!(registry.find("sha256:aa").unwrap().unwrap().users.len(), 2);
        assert!(!registry.release(first.spec.hop, "migration 1").unwrap());
        assert!(!registry.release(first.spec.hop, "migration 1").unwrap());
        let forgotten = registry.forget("migration 2").unwrap();
        assert_eq!(forgotten.len(), 2);
        assert!(registry.forget("migration 2").unwrap().is_empty());
        assert!(registry.release(first.spec.hop, "nobody").unwrap());
        registry.remove(first.spec.hop).unwrap();
        registry.remove(first.spec.hop).unwrap();
        assert!(registry.find("sha256:aa").unwrap().is_none());
        assert_eq!(registry.list().unwrap().len(), 1);
    }

    #[test]
    fn threads_get_distinct_numbers() {
        let (_directory, registry) = registry();
        let numbers: Vec<HopId> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|thread| {
                    let registry = registry.clone();
                    scope.spawn(move || {
                        (0..8)
                            .map(|i| {
                                let peer = format!("peer {thread}/{i}");
                                let (hop, created) = acquire(&registry, &peer, "test");
                                assert!(created);
                                hop.spec.hop
                            })
                            .collect::<Vec<_>>()
                    })
                })
                .collect();
            threads
                .into_iter()
                .flat_map(|t| t.join().unwrap())
                .collect()
        });
        let distinct: BTreeSet<HopId> = numbers.iter().copied().collect();
        assert_eq!(distinct.len(), 64);
    }

    #[test]
    fn threads_that_want_the_same_peer_get_one_hop() {
        let (_directory, registry) = registry();
        let made: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|thread| {
                    let registry = registry.clone();
                    scope.spawn(move || acquire(&registry, "peer", &format!("user {thread}")).1)
                })
                .collect();
            threads
                .into_iter()
                .map(|t| usize::from(t.join().unwrap()))
                .sum()
        });
        assert_eq!(made, 1);
        assert_eq!(registry.find("peer").unwrap().unwrap().users.len(), 8);
    }

    #[test]
    fn all_numbers_are_given_out_and_no_more() {
        let (_directory, registry) = registry();
        for i in 0..255 {
            acquire(&registry, &format!("peer {i}"), "test");
        }
        let full = registry.acquire("one more", "test", Backend::Userspace, Path::new("/"));
        assert!(matches!(full, Err(Error::Exhausted)));
        registry.remove(HopId::try_from(77).unwrap()).unwrap();
        assert_eq!(acquire(&registry, "one more", "test").0.spec.hop.get(), 77);
    }

    #[test]
    fn what_a_dead_process_left_is_taken_over() {
        let (_directory, registry) = registry();
        let (hop, _) = acquire(&registry, "peer", "test");
        registry
            .update(hop.spec.hop, |hop| {
                // No process starts at the end of time.
                hop.owners = vec![Process {
                    pid: 1,
                    started: u64::MAX,
                }];
            })
            .unwrap();
        let (next, created) = acquire(&registry, "another", "test");
        assert!(created);
        assert_eq!(next.spec.hop, hop.spec.hop);
        assert!(registry.find("peer").unwrap().is_none());
    }

    #[test]
    fn a_retired_hop_keeps_its_number_but_not_its_peer() {
        let (_directory, registry) = registry();
        let (hop, _) = acquire(&registry, "peer", "test");
        assert!(
            registry.retire(&hop.spec, true).unwrap().is_none(),
            "it has a user"
        );
        registry.release(hop.spec.hop, "test").unwrap();
        let stranger = HopSpec {
            made: !hop.spec.made,
            ..hop.spec.clone()
        };
        assert!(
            registry.retire(&stranger, false).unwrap().is_none(),
            "another hop's number"
        );
        assert!(registry.retire(&hop.spec, true).unwrap().is_some());
        let (next, created) = acquire(&registry, "peer", "test");
        assert!(created);
        assert_ne!(next.spec.hop, hop.spec.hop);
    }

    #[test]
    fn a_damaged_record_is_named() {
        let (_directory, registry) = registry();
        let (hop, _) = acquire(&registry, "peer", "test");
        std::fs::write(registry.path(hop.spec.hop), "{").unwrap();
        let error = registry.find("peer").unwrap_err();
        assert!(error.to_string().contains("1.json"), "{error}");
        assert!(error.hint().unwrap().contains("1.json"));
    }
}
