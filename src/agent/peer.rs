//! The hosts that this one knows.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::store::{self, Existing};
use super::{DEFAULT_PORT, Error, Fingerprint, Limits, Result};

/// The directory of the peers in the state directory.
const DIRECTORY: &str = "peers";
/// A peer's file takes less than 500 bytes.
const FILE_LIMIT: u64 = 16 * 1024;

/// The name by which a host is known to another: 1 to 63 of `a-z`, `0-9`, `.` and `-`, with a
/// letter or digit first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PeerName(String);

impl PeerName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn file(&self) -> String {
        format!("{}.json", self.0)
    }
}

impl FromStr for PeerName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let bytes = name.as_bytes();
        if (1..=63).contains(&bytes.len())
            && allowed(bytes[0])
            && bytes.iter().all(|&b| allowed(b) || b == b'.' || b == b'-')
        {
            Ok(PeerName(name.to_owned()))
        } else {
            Err(Error::BadName {
                name: name.chars().take(80).collect(),
            })
        }
    }
}

impl TryFrom<String> for PeerName {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<PeerName> for String {
    fn from(name: PeerName) -> String {
        name.0
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where an agent listens: a host name or an IP address, and a port.
///
/// As text `host-b:27757`, `192.0.2.7:27757` or `[2001:db8::7]:27757`; without a port it means
/// [`DEFAULT_PORT`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address {
    host: String,
    port: u16,
}

impl Address {
    /// The host name or the IP address, the latter without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl From<std::net::SocketAddr> for Address {
    fn from(address: std::net::SocketAddr) -> Address {
        Address {
            host: address.ip().to_string(),
            port: address.port(),
        }
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |reason| Error::BadAddress {
            text: text.chars().take(300).collect(),
            reason,
        };
        let parse_port = |port: &str| {
            Some(port)
                // A number's own parser would take a sign.
                .filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
                .and_then(|port| port.parse::<u16>().ok())
                .filter(|port| *port != 0)
                .ok_or_else(|| bad("the port is not a number from 1 to 65535"))
        };
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Ok(Address {
                host: ip.to_string(),
                port: DEFAULT_PORT,
            });
        }
        if let Some(rest) = text.strip_prefix('[') {
            let (ip, port) = rest
                .split_once(']')
                .ok_or_else(|| bad("the bracket is not closed"))?;
            let ip: std::net::Ipv6Addr = ip
                .parse()
                .map_err(|_| bad("there is no IPv6 address in the brackets"))?;
            let port = match port.strip_prefix(':') {
                Some(port) => parse_port(port)?,
                None if port.is_empty() => DEFAULT_PORT,
                None => return Err(bad("something other than a port follows the bracket")),
            };
            return Ok(Address {
                host: ip.to_string(),
                port,
            });
        }
        let (host, port) = match text.split_once(':') {
            Some((host, port)) => (host, parse_port(port)?),
            None => (text, DEFAULT_PORT),
        };
        // RFC 1123 section 2.1, and the underscore that local names use.
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        if host.len() > 253 || !host.trim_end_matches('.').split('.').all(label) {
            return Err(bad("the host is neither a name nor an IP address"));
        }
        Ok(Address {
            host: host.to_ascii_lowercase(),
            port,
        })
    }
}

impl TryFrom<String> for Address {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> String {
        address.to_string()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Something that a peer may do with this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Permission {
    /// It may send containers to this host.
    Send,
    /// It may receive containers from this host.
    Receive,
    /// It may introduce hosts to this one, for paths only: they may neither send nor receive.
    Introduce,
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Permission::Send => "send",
            Permission::Receive => "receive",
            Permission::Introduce => "introduce",
        })
    }
}

/// The name is not one of something that a peer may do.
#[derive(Debug, Clone, thiserror::Error)]
#[error("`{0}` is none of send, receive and introduce")]
pub struct UnknownPermission(String);

impl FromStr for Permission {
    type Err = UnknownPermission;

    fn from_str(name: &str) -> Result<Self, UnknownPermission> {
        [Permission::Send, Permission::Receive, Permission::Introduce]
            .into_iter()
            .find(|permission| permission.to_string() == name)
            .ok_or_else(|| UnknownPermission(name.to_owned()))
    }
}

/// A host that this one knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// What this host calls it.
    pub name: PeerName,
    /// Where its agent listens. A host that only ever calls has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Address>,
    /// Its key.
    pub fingerprint: Fingerprint,
    /// The key that it is about to have instead: accepted as well, and the only one from its first use
    /// on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Fingerprint>,
    /// Its first key, if it has had another since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first: Option<Fingerprint>,
    /// Since when it is known, in whole seconds.
    #[serde(with = "super::unix_seconds")]
    pub added: SystemTime,
    /// What it may do.
    #[serde(default)]
    pub may: BTreeSet<Permission>,
}

impl Peer {
    /// A peer that is added now and may both send and receive.
    pub fn new(name: PeerName, address: Option<Address>, fingerprint: Fingerprint) -> Peer {
        Peer {
            name,
            address,
            fingerprint,
            next: None,
            first: None,
            added: super::unix_seconds::to(super::unix_seconds::from(SystemTime::now()))
                .unwrap_or(SystemTime::UNIX_EPOCH),
            may: [Permission::Send, Permission::Receive].into(),
        }
    }

    /// What it is called in what outlives its keys (tunnels, and migrations that are under way): the first
    /// key by which it was known here.
    pub fn lasting(&self) -> Fingerprint {
        self.first.unwrap_or(self.fingerprint)
    }

    /// The keys that are taken for its own: the one that it has first.
    pub fn keys(&self) -> impl Iterator<Item = Fingerprint> {
        [Some(self.fingerprint), self.next].into_iter().flatten()
    }

    /// Whether a key is or was this host's.
    fn has_had(&self, key: Fingerprint) -> bool {
        self.keys().chain(self.first).any(|own| own == key)
    }

    /// Whether it may do this.
    pub fn may(&self, permission: Permission) -> bool {
        self.may.contains(&permission)
    }
}

/// The store of the known hosts: one file for each, `<state_dir>/peers/<name>.json`.
///
/// Nothing is cached: a peer that the command adds or removes is known or unknown to a running
/// agent at its next request.
#[derive(Debug, Clone)]
pub struct Peers {
    directory: PathBuf,
    limit: usize,
}

impl Peers {
    /// The store under a state directory. Creates its directory.
    ///
    /// # Errors
    /// [`Error::File`] if the directory cannot be created.
    pub fn open(state_dir: &Path, limits: &Limits) -> Result<Peers> {
        let directory = state_dir.join(DIRECTORY);
        store::private_directory(&directory)?;
        Ok(Peers {
            directory,
            limit: limits.peers,
        })
    }

    /// All peers, by name.
    ///
    /// # Errors
    /// [`Error::BadFile`] and [`Error::File`] for the first file that cannot be read.
    pub fn list(&self) -> Result<Vec<Peer>> {
        let mut peers = Vec::new();
        for name in self.names()? {
            // A file that went away since is no error.
            peers.extend(self.find(&name)?);
        }
        Ok(peers)
    }

    /// The peer of this name, if there is one.
    ///
    /// # Errors
    /// [`Error::BadFile`] and [`Error::File`] if its file cannot be read.
    pub fn find(&self, name: &PeerName) -> Result<Option<Peer>> {
        let path = self.directory.join(name.file());
        let Some(content) = store::read(&path, FILE_LIMIT)? else {
            return Ok(None);
        };
        let peer: Peer = serde_json::from_slice(&content).map_err(|source| Error::BadFile {
            path: path.clone(),
            source,
        })?;
        if peer.name != *name {
            return Err(Error::BadFile {
                path,
                source: serde::de::Error::custom("the name in it is not that of the file"),
            });
        }
        Ok(Some(peer))
    }

    /// The peer of this name.
    ///
    /// # Errors
    /// [`Error::UnknownPeer`] if there is none; else as [`Peers::find`].
    pub fn get(&self, name: &PeerName) -> Result<Peer> {
        self.find(name)?
            .ok_or_else(|| Error::UnknownPeer { name: name.clone() })
    }

    /// The peer with this key, or that is about to have it, if there is one.
    ///
    /// A file that cannot be read is passed over with a warning in the log, so that it does not
    /// lock out the other peers.
    ///
    /// # Errors
    /// [`Error::File`] if the directory cannot be read.
    pub fn by_fingerprint(&self, fingerprint: Fingerprint) -> Result<Option<Peer>> {
        self.first_that(|peer| peer.keys().any(|key| key == fingerprint))
    }

    fn first_that(&self, is_it: impl Fn(&Peer) -> bool) -> Result<Option<Peer>> {
        for name in self.names()? {
            match self.find(&name) {
                Ok(Some(peer)) if is_it(&peer) => return Ok(Some(peer)),
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, "passed over a peer"),
            }
        }
        Ok(None)
    }

    /// Adds a peer, or updates the one with this name and this key.
    ///
    /// What an existing peer may do, and since when it is known, stays as it is.
    ///
    /// # Errors
    /// [`Error::NameTaken`] if the name belongs to another key, [`Error::KnownAs`] if the key is
    /// known by another name, [`Error::TooManyPeers`]; [`Error::File`] if writing fails.
    pub fn add(&self, peer: &Peer) -> Result<Peer> {
        let _lock = store::lock(&self.directory)?;
        let mut peer = peer.clone();
        match self.check(&peer.name, peer.fingerprint)? {
            Some(known) => {
                peer.may = known.may;
                peer.next = known.next;
                peer.first = known.first;
                peer.added = known.added;
                peer.address = peer.address.or(known.address);
            }
            None => {
                if self.names()?.len() >= self.limit {
                    return Err(Error::TooManyPeers { limit: self.limit });
                }
            }
        }
        self.write(&peer)?;
        Ok(peer)
    }

    /// Whether a peer could be added: `Some` if it is known by just this name and key.
    ///
    /// # Errors
    /// [`Error::NameTaken`] and [`Error::KnownAs`].
    pub(super) fn check(&self, name: &PeerName, fingerprint: Fingerprint) -> Result<Option<Peer>> {
        // Also a key that a host once had: what it is called by that is not to be another's.
        if let Some(other) = self.first_that(|peer| peer.has_had(fingerprint))?
            && other.name != *name
        {
            return Err(Error::KnownAs {
                name: other.name,
                fingerprint,
            });
        }
        match self.find(name)? {
            Some(other) if other.fingerprint != fingerprint => Err(Error::NameTaken {
                name: other.name,
                fingerprint: other.fingerprint,
            }),
            known => Ok(known),
        }
    }

    /// Takes note that a peer is about to have another key. `key` is the one by which it said so.
    ///
    /// Its present one is accepted until the other is used ([`Peers::used`]). Told twice, it is noted once;
    /// told another, that is the one.
    ///
    /// # Errors
    /// [`Error::NotAPeer`] if no peer has that key at present, [`Error::KnownAs`] if the new one is or was
    /// another's; [`Error::File`] if writing fails.
    pub fn will_have(&self, key: Fingerprint, next: Fingerprint) -> Result<Peer> {
        let _lock = store::lock(&self.directory)?;
        let mut peer = self
            .first_that(|peer| peer.fingerprint == key)?
            .ok_or(Error::NotAPeer { fingerprint: key })?;
        if next == key || peer.next == Some(next) {
            return Ok(peer);
        }
        if let Some(other) = self.first_that(|other| other.has_had(next))?
            // It may have had second thoughts about one of its own, but not go back to its first: whoever
            // has that is somebody from whom it wants to be told apart.
            && (other.name != peer.name || other.first == Some(next))
        {
            return Err(Error::KnownAs {
                name: other.name,
                fingerprint: next,
            });
        }
        peer.next = Some(next);
        self.write(&peer)?;
        Ok(peer)
    }

    /// A peer has shown this key. If it is the one that it was about to have, it has no other from now on.
    ///
    /// # Errors
    /// [`Error::File`] if writing fails.
    pub fn used(&self, key: Fingerprint) -> Result<()> {
        let _lock = store::lock(&self.directory)?;
        let Some(mut peer) = self.first_that(|peer| peer.next == Some(key))? else {
            return Ok(());
        };
        peer.first = Some(peer.lasting());
        peer.fingerprint = key;
        peer.next = None;
        tracing::info!(name = %peer.name, %key, "a host has another key from now on");
        self.write(&peer)
    }

    /// Changes what a peer may do.
    ///
    /// # Errors
    /// [`Error::UnknownPeer`] if there is none of this name; [`Error::File`] if writing fails.
    pub fn allow(&self, name: &PeerName, may: BTreeSet<Permission>) -> Result<Peer> {
        let _lock = store::lock(&self.directory)?;
        let mut peer = self.get(name)?;
        peer.may = may;
        self.write(&peer)?;
        Ok(peer)
    }

    /// Forgets a peer; `false` if there was none of this name.
    ///
    /// # Errors
    /// [`Error::File`] if its file cannot be removed.
    pub fn remove(&self, name: &PeerName) -> Result<bool> {
        let _lock = store::lock(&self.directory)?;
        store::remove(&self.directory, &name.file())
    }

    fn names(&self) -> Result<Vec<PeerName>> {
        Ok(store::names(&self.directory)?
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect())
    }

    fn write(&self, peer: &Peer) -> Result<()> {
        let path = peer.name.file();
        let content = serde_json::to_vec_pretty(peer).map_err(|source| Error::BadFile {
            path: self.directory.join(&path),
            source,
        })?;
        store::write(&self.directory, &path, &content, Existing::Replace).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint(of: u8) -> Fingerprint {
        Fingerprint::from_bytes([of; 32])
    }

    fn peer(name: &str, of: u8) -> Peer {
        Peer::new(name.parse().unwrap(), None, fingerprint(of))
    }

    fn peers() -> (tempfile::TempDir, Peers) {
        let state = tempfile::tempdir().unwrap();
        let limits = Limits {
            peers: 3,
            ..Limits::default()
        };
        let peers = Peers::open(state.path(), &limits).unwrap();
        (state, peers)
    }

    #[test]
    fn names_are_names_of_files_as_well() {
        for good in ["a", "host-b", "0.example.org", "a..b", &"x".repeat(63)] {
            assert_eq!(good.parse::<PeerName>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            ".",
            "..",
            "-a",
            ".a",
            "a/b",
            "../a",
            "A",
            "a b",
            "a\0",
            "ä",
            &"x".repeat(64),
        ] {
            assert!(
                matches!(bad.parse::<PeerName>(), Err(Error::BadName { .. })),
                "{bad}"
            );
        }
    }

    #[test]
    fn addresses_are_read_and_written() {
        for (text, host, port, shown) in [
            ("host-b", "host-b", DEFAULT_PORT, "host-b:27757"),
            (
                "Host-B.example.:1",
                "host-b.example.",
                1,
                "host-b.example.:1",
            ),
            ("192.0.2.7", "192.0.2.7", DEFAULT_PORT, "192.0.2.7:27757"),
            ("192.0.2.7:65535", "192.0.2.7", 65535, "192.0.2.7:65535"),
            (
                "2001:db8::7",
                "2001:db8::7",
                DEFAULT_PORT,
                "[2001:db8::7]:27757",
            ),
            (
                "[2001:db8::7]",
                "2001:db8::7",
                DEFAULT_PORT,
                "[2001:db8::7]:27757",
            ),
            ("[2001:db8::7]:9", "2001:db8::7", 9, "[2001:db8::7]:9"),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!((address.host(), address.port()), (host, port));
            assert_eq!(address.to_string(), shown);
            assert_eq!(shown.parse::<Address>().unwrap(), address);
        }
        for bad in [
            "",
            ":1",
            "a:",
            "a:0",
            "a:65536",
            "a:+1",
            "a: 1",
            "a:1 ",
            "a b",
            "a/b",
            "[::1",
            "[::1]1",
            "[a]:1",
            "a..b",
            "-a",
            "http://a",
            "a\r\nb: c",
            "a@b",
            &"a".repeat(64),
        ] {
            assert!(
                matches!(bad.parse::<Address>(), Err(Error::BadAddress { .. })),
                "{bad}"
            );
        }
    }

    #[test]
    fn peers_are_found_by_name_and_by_key() {
        let (state, peers) = peers();
        assert_eq!(peers.list().unwrap(), []);
        let (a, b) = (peer("a", 1), peer("b", 2));
        peers.add(&b).unwrap();
        peers.add(&a).unwrap();
        assert_eq!(peers.list().unwrap(), [a.clone(), b.clone()]);
        assert_eq!(peers.get(&a.name).unwrap(), a);
        assert_eq!(
            peers.by_fingerprint(fingerprint(2)).unwrap(),
            Some(b.clone())
        );
        assert_eq!(peers.by_fingerprint(fingerprint(3)).unwrap(), None);
        assert!(matches!(
            peers.get(&"c".parse().unwrap()),
            Err(Error::UnknownPeer { .. })
        ));

        // Another process sees the same.
        let others = Peers::open(state.path(), &Limits::default()).unwrap();
        assert_eq!(others.list().unwrap().len(), 2);
        assert!(others.remove(&a.name).unwrap());
        assert!(!others.remove(&a.name).unwrap());
        assert_eq!(peers.by_fingerprint(a.fingerprint).unwrap(), None);
    }

    #[test]
    fn a_name_and_a_key_belong_together() {
        let (_state, peers) = peers();
        peers.add(&peer("a", 1)).unwrap();
        match peers.add(&peer("a", 2)) {
            Err(Error::NameTaken {
                fingerprint: whose, ..
            }) => assert_eq!(whose, fingerprint(1)),
            other => panic!("{other:?}"),
        }
        match peers.add(&peer("b", 1)) {
            Err(Error::KnownAs { name, .. }) => assert_eq!(name.as_str(), "a"),
            other => panic!("{other:?}"),
        }
        // Added again, it gets its new address, and no more rights than it had.
        peers
            .allow(&"a".parse().unwrap(), [Permission::Send].into())
            .unwrap();
        let mut again = peer("a", 1);
        again.address = Some("a.example:7".parse().unwrap());
        peers.add(&again).unwrap();
        let known = peers.get(&again.name).unwrap();
        assert_eq!(known.address, again.address);
        assert!(known.may(Permission::Send) && !known.may(Permission::Receive));
        assert_eq!(peers.list().unwrap().len(), 1);
    }

    #[test]
    fn there_are_so_many_and_no_more() {
        let (_state, peers) = peers();
        for n in 0..3 {
            peers.add(&peer(&format!("host-{n}"), n)).unwrap();
        }
        assert!(matches!(
            peers.add(&peer("host-3", 3)),
            Err(Error::TooManyPeers { limit: 3 })
        ));
        peers.add(&peer("host-2", 2)).unwrap();
    }

    #[test]
    fn a_broken_file_locks_out_nobody_else() {
        let (state, peers) = peers();
        peers.add(&peer("b", 2)).unwrap();
        let broken = state.path().join("peers/a.json");
        let forged = serde_json::to_string(&peer("z", 1)).unwrap();
        for content in ["", "{", "null", &"x".repeat(20_000), &forged] {
            std::fs::write(&broken, content).unwrap();
            assert!(peers.by_fingerprint(fingerprint(2)).unwrap().is_some());
            assert_eq!(peers.by_fingerprint(fingerprint(1)).unwrap(), None);
            let error = peers.list().unwrap_err();
            assert!(
                matches!(error, Error::BadFile { .. } | Error::FileTooLarge { .. }),
                "{error:?}"
            );
            assert!(error.to_string().contains("a.json"), "{error}");
        }
    }
}
