//! What each subcommand does: a call or two into the library, and how the answer is shown.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::CommandFactory;
use livemig::agent::{
    Address, DEFAULT_PORT, Identity, Invites, JoinAs, Offer, PeerName, Peers, Permission, Server,
    Sessions, Token, Told, Trust, Word,
};
use livemig::conntrack::{Counting, Direction};
use livemig::migration::{self, Event, Hopless, Keep, Observer, Phase, Policy};
use livemig::{Config, Error, Request};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::cli::{Cli, Command, Move};
use crate::exit;
use crate::priority;
use crate::progress::{Bytes, Progress, summary};
use crate::table::Table;
use crate::verdict;

pub async fn run(cli: Cli) -> Result<ExitCode, Error> {
    let config = cli.place.config();
    let json = cli.json;
    match cli.command {
        Command::Agent {
            listen,
            allow,
            allow_bind,
            incoming,
        } => {
            let config = Config {
                arrivals: Policy {
                    allowed: allow.into_iter().collect(),
                    binds: allow_bind,
                },
                incoming: incoming.into(),
                ..config
            };
            agent(config, listen).await
        }
        Command::Invite { address, valid } => invite(&config, address, valid, json),
        Command::Join {
            token,
            name,
            address,
        } => join(&config, &token, name, address, json).await,
        Command::Hosts => hosts(&config, json),
        Command::Allow { host, may } => allow(&config, &host, may, json),
        Command::Revoke { host, now } => revoke(&config, &host, now, json).await,
        Command::Rekey { without } => rekey(&config, &without, json).await,
        Command::Migrate {
            what,
            keep_volumes,
            forward_new,
            keep_chain,
            when_full,
            hold_packets,
            hold_mib,
            engine,
            max_downtime,
            rounds,
            when_over,
            post_copy,
            rehearse,
            report,
        } => {
            let config = Config {
                hold_packets,
                hold_bytes: hold_mib << 20,
                ..config
            };
            #[cfg(debug_assertions)]
            let config = crate::standstill::bounds(config);
            let request = request(config, what)
                .keep_volumes(keep_volumes)
                .forward_new(forward_new)
                .keep_chain(keep_chain)
                .when_full(when_full.into())
                .engine(engine.map(Into::into))
                .post_copy(post_copy)
                .max_downtime(Duration::from_millis(max_downtime))
                .when_over(when_over.into())
                .most_rounds(rounds)
                .rehearse(rehearse);
            migrate(request, report.as_deref(), json).await
        }
        Command::Check(what) => check(&request(config, what), json).await,
        Command::Plan(what) => plan(&request(config, what), json).await,
        Command::Ps => ps(&config, json).await,
        Command::Flows {
            container,
            stop_forwarding: true,
            ..
        } => stop_forwarding(&config, container.as_deref(), json).await,
        Command::Flows {
            container, watch, ..
        } => flows(&config, container.as_deref(), watch, json).await,
        Command::Recover { keep } => recover(&config, keep.map(Into::into), json).await,
        Command::Setup { remove } => setup(&config, remove, json),
        Command::Completions { shell } => {
            clap_complete::generate(
                shell,
                &mut Cli::command(),
                "livemig",
                &mut std::io::stdout(),
            );
            Ok(ExitCode::SUCCESS)
        }
        Command::TunnelDevice { interface, socket } => {
            livemig::tunnel::userspace::run_device(&interface, &socket).await?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn request(config: Config, what: Move) -> Request {
    Request::new(what.container, what.to).config(config)
}

fn print_json<T: Serialize>(value: &T) -> ExitCode {
    match serde_json::to_string_pretty(value) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("livemig: cannot write the answer as JSON: {error}");
            ExitCode::FAILURE
        }
    }
}

fn setup(config: &Config, remove: bool, json: bool) -> Result<ExitCode, Error> {
    migration::must_be_root()?;
    let done = match remove {
        true => livemig::runtime::setup::remove(config)?,
        false => livemig::runtime::setup::install(config)?,
    };
    if json {
        return Ok(print_json(&done));
    }
    let (drop_in, runtimes) = (done.drop_in.display(), done.runtimes.join(" and "));
    match (remove, done.changed) {
        (false, true) => println!(
            "livemig stands in front of {runtimes} ({drop_in})\n\
             now restart Podman's service, which reads its configuration when it starts: \
             systemctl restart podman.service"
        ),
        (false, false) => println!("livemig stands in front of {runtimes} already ({drop_in})"),
        (true, true) => println!(
            "livemig is gone from in front of Podman's runtimes\n\
             now restart Podman's service: systemctl restart podman.service"
        ),
        (true, false) => println!("nothing was set up"),
    }
    Ok(ExitCode::SUCCESS)
}

async fn agent(config: Config, listen: std::net::SocketAddr) -> Result<ExitCode, Error> {
    migration::must_be_root()?;
    let limits = config.limits.clone();
    let trust = Trust::open(&config.state_dir, own_name()?, &limits)?;
    let fingerprint = trust.identity.fingerprint();
    let sessions = std::sync::Arc::new(Sessions::new(config));
    for line in sessions.resume().await? {
        println!("{line}");
    }
    let server = Server::bind(listen, trust, limits).await?;
    let counting = Counting::begin();
    println!(
        "listening on {}, fingerprint {fingerprint}",
        server.local_addr()?
    );
    let rounds = tokio::spawn(sessions.clone().look_after());
    server.serve(sessions, asked_to_stop()).await;
    rounds.abort();
    drop(counting);
    Ok(ExitCode::SUCCESS)
}

/// Ends when somebody wants the program to end.
async fn asked_to_stop() {
    use tokio::signal::unix::{SignalKind, signal};
    // A lost terminal ends the program as well, unless it was started to survive that (nohup).
    let survives = ignores_hangup();
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        return std::future::pending().await;
    };
    let hangup = async {
        match (survives, signal(SignalKind::hangup())) {
            (false, Ok(mut hangup)) => hangup.recv().await,
            _ => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = hangup => {}
    }
}

/// Whether the signal for a lost terminal was ignored when the program began: `SigIgn` in
/// proc_pid_status(5).
fn ignores_hangup() -> bool {
    const SIGHUP_BIT: u64 = 1;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & SIGHUP_BIT != 0)
}

/// What this host calls itself: its host name, as far as that can be one.
fn own_name() -> Result<PeerName, Error> {
    let name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .to_lowercase();
    Ok(name.parse()?)
}

fn invite(
    config: &Config,
    address: Option<String>,
    valid: Duration,
    json: bool,
) -> Result<ExitCode, Error> {
    migration::must_be_root()?;
    let limits = &config.limits;
    let identity = Identity::load_or_create(&config.state_dir)?;
    let address: Address = match address {
        Some(address) => with_port(&address).parse()?,
        None => with_port(&outward_address()).parse()?,
    };
    let offer = Offer {
        name: own_name()?,
        address,
        fingerprint: identity.fingerprint(),
    };
    let token = Invites::open(&config.state_dir, limits)?.create(&offer, valid)?;
    if json {
        return Ok(print_json(&serde_json::json!({
            "token": token.to_string(),
            "address": offer.address.to_string(),
            "fingerprint": offer.fingerprint.to_string(),
            "valid_seconds": valid.as_secs(),
        })));
    }
    println!("{token}");
    eprintln!(
        "good for one use within {} minutes; on the other host: livemig join TOKEN",
        valid.as_secs().div_ceil(60)
    );
    Ok(ExitCode::SUCCESS)
}

/// The address that packets to the outside leave from; none is sent to find out.
fn outward_address() -> String {
    let probe = || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
        // An address for documentation (RFC 5737): connecting a UDP socket only looks up the route.
        socket.connect("192.0.2.1:9").ok()?;
        Some(socket.local_addr().ok()?.ip().to_string())
    };
    probe().unwrap_or_else(|| {
        rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned()
    })
}

fn with_port(address: &str) -> String {
    let has_port = address.rsplit_once(':').is_some_and(|(host, port)| {
        port.parse::<u16>().is_ok() && (!host.contains(':') || host.ends_with(']'))
    });
    match (has_port, address.parse::<std::net::Ipv6Addr>()) {
        (_, Ok(address)) => format!("[{address}]:{DEFAULT_PORT}"),
        (true, _) => address.to_owned(),
        (false, _) => format!("{address}:{DEFAULT_PORT}"),
    }
}

async fn join(
    config: &Config,
    token: &str,
    name: Option<String>,
    address: Option<String>,
    json: bool,
) -> Result<ExitCode, Error> {
    migration::must_be_root()?;
    let limits = &config.limits;
    let token: Token = token.trim().parse().map_err(livemig::agent::Error::from)?;
    let own = JoinAs {
        name: own_name()?,
        address: address
            .map(|address| with_port(&address).parse())
            .transpose()?,
        call_it: name.map(|name| name.parse()).transpose()?,
    };
    let identity = Identity::load_or_create(&config.state_dir)?;
    let peers = Peers::open(&config.state_dir, limits)?;
    let peer = livemig::agent::join(&token, &own, &identity, &peers, limits).await?;
    if json {
        return Ok(print_json(&peer));
    }
    println!("{} is known here now, and this host there", peer.name);
    Ok(ExitCode::SUCCESS)
}

fn hosts(config: &Config, json: bool) -> Result<ExitCode, Error> {
    migration::must_be_root()?;
    let peers = Peers::open(&config.state_dir, &config.limits)?.list()?;
    if json {
        return Ok(print_json(&peers));
    }
    let mut table = Table::new(&["name", "address", "may", "fingerprint"]);
    for peer in peers {
        let may: Vec<String> = peer.may.iter().map(ToString::to_string).collect();
        let address = peer
            .address
            .map_or_else(|| "-".to_owned(), |address| address.to_string());
        table.row([
            peer.name.to_string(),
            address,
            may.join(","),
            peer.fingerprint.to_string(),
        ]);
    }
    print!("{table}");
    Ok(ExitCode::SUCCESS)
}

fn allow(config: &Config, host: &str, may: Vec<Permission>, json: bool) -> Result<ExitCode, Error> {
    migration::must_be_root()?;
    let peers = Peers::open(&config.state_dir, &config.limits)?;
    let peer = peers.allow(&host.parse()?, may.into_iter().collect())?;
    if json {
        return Ok(print_json(&peer));
    }
    let may: Vec<String> = peer.may.iter().map(ToString::to_string).collect();
    if may.is_empty() {
        println!("{} may do nothing here", peer.name);
    } else {
        println!("{} may {}", peer.name, may.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}

async fn revoke(config: &Config, host: &str, now: bool, json: bool) -> Result<ExitCode, Error> {
    let revoked = migration::revoke(config, host, now).await?;
    let done = if revoked.leftovers.is_empty() {
        ExitCode::SUCCESS
    } else {
        exit::leftovers()
    };
    if json {
        print_json(&revoked);
        return Ok(done);
    }
    let name = match &revoked.name {
        Some(name) => {
            println!("{name} is not known here any more: whatever it asks is refused");
            name.to_string()
        }
        None => "that host".to_owned(),
    };
    if revoked.invitations > 0 {
        println!("open invitations are withdrawn: make new ones for others (livemig invite)");
    }
    for container in &revoked.forwardings {
        println!("no more new connections of `{container}` are carried to or from {name}");
    }
    match revoked.hop {
        Hopless::None => {}
        Hopless::Down => {
            println!("the tunnel to {name} is down");
            for flow in &revoked.flows {
                println!("  cut off: {flow}");
            }
        }
        Hopless::Kept => {
            println!("the tunnel to {name} stays until what uses it has ended:");
            for flow in &revoked.flows {
                println!("  {flow}");
            }
            for migration in &revoked.migrations {
                println!("  migration {migration}");
            }
            println!(
                "  → to end them now: livemig revoke {} --now",
                revoked.fingerprint
            );
        }
    }
    for introducer in &revoked.introducers {
        println!(
            "{introducer} may introduce hosts, {name} again too, for paths only: see `livemig allow --help`"
        );
    }
    for leftover in &revoked.leftovers {
        println!("still there: {leftover}");
    }
    Ok(done)
}

async fn rekey(config: &Config, without: &[PeerName], json: bool) -> Result<ExitCode, Error> {
    migration::must_be_root()?;
    let rekeyed = livemig::agent::rekey(&config.state_dir, without, &config.limits).await?;
    let done = match (&rekeyed.next, rekeyed.is_done()) {
        (Some(_), _) => exit::refused(),
        (None, true) => ExitCode::SUCCESS,
        (None, false) => exit::leftovers(),
    };
    if json {
        print_json(&rekeyed);
        return Ok(done);
    }
    match &rekeyed.next {
        None => println!("the key of this host is {} now", rekeyed.fingerprint),
        Some(_) => println!("the key of this host is {} still", rekeyed.fingerprint),
    }
    for Told { name, word } in &rekeyed.peers {
        match word {
            Word::New => println!("{name} knows the new key, and the old one no more"),
            Word::Both { why: None } => println!("{name} has been told, and accepts both keys"),
            Word::Both { why: Some(why) } => println!(
                "{name} accepts both keys until it sees the new one, which it has not: {why}"
            ),
            Word::Old { why } => println!(
                "{name} could not be told: {why}\n  \
                 → see to it that its agent can be reached; or leave it out: --without {name}"
            ),
            Word::Lost => println!(
                "{name} is left out\n  \
                 → afterwards, on both hosts: livemig revoke; then livemig invite and livemig join"
            ),
        }
    }
    if rekeyed.invitations > 0 {
        println!("open invitations are withdrawn: make new ones (livemig invite)");
    }
    if !rekeyed.is_done() {
        println!("to go on from here: livemig rekey");
    }
    Ok(done)
}

async fn migrate(
    request: Request,
    report_to: Option<&Path>,
    json: bool,
) -> Result<ExitCode, Error> {
    let cancel = CancellationToken::new();
    let request = request.cancel(cancel.clone());
    // Asked to stop, it undoes what it has done; asked again, it goes on undoing.
    tokio::spawn(async move {
        asked_to_stop().await;
        cancel.cancel();
    });
    let mut progress = Progress::new(json);
    priority::stand_back();
    let mut observer = |event: Event| {
        match &event {
            // From here on packets wait.
            Event::Started {
                phase: Phase::Freeze,
            }
            | Event::RollingBack { .. }
            | Event::StandsStill => priority::step_forward(),
            Event::GoesOn => priority::stand_back(),
            _ => {}
        }
        #[cfg(debug_assertions)]
        let moment = event.clone();
        progress.observe(event);
        #[cfg(debug_assertions)]
        crate::standstill::at(&moment);
    };
    let outcome = migration::migrate(&request, &mut observer).await;
    drop(progress);
    if let (Ok(report), Some(path)) = (&outcome, report_to) {
        // The container has moved: that the file cannot be written must not look as if it had not.
        let written = serde_json::to_vec_pretty(report)
            .map_err(std::io::Error::from)
            .and_then(|text| std::fs::write(path, text));
        if let Err(error) = written {
            eprintln!(
                "livemig: cannot write the report to {}: {error}",
                path.display()
            );
        }
    }
    match outcome {
        Err(Error::RolledBack {
            cause, leftovers, ..
        }) if matches!(*cause, Error::Rehearsed(_)) && leftovers.is_empty() => {
            if !json {
                println!(
                    "{cause}; everything was undone, and `{}` runs on here",
                    request.container
                );
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => Err(error),
        Ok(report) if json => {
            println!(
                "{}",
                serde_json::json!({ "event": "report", "report": report })
            );
            Ok(if report.leftovers.is_empty() {
                ExitCode::SUCCESS
            } else {
                exit::untidy()
            })
        }
        Ok(report) => {
            summary(&report);
            Ok(if report.leftovers.is_empty() {
                ExitCode::SUCCESS
            } else {
                exit::untidy()
            })
        }
    }
}

async fn check(request: &Request, json: bool) -> Result<ExitCode, Error> {
    let preflight = migration::check(request).await?;
    if json {
        print_json(&verdict::json(&preflight, &request.to));
    } else {
        verdict::print(&preflight, &request.to);
    }
    Ok(if preflight.passes() {
        ExitCode::SUCCESS
    } else {
        exit::refused()
    })
}

async fn plan(request: &Request, json: bool) -> Result<ExitCode, Error> {
    let plan = migration::plan(request).await?;
    if json {
        let mut answer = verdict::json(&plan.preflight, &request.to);
        answer["steps"] = serde_json::json!(plan.steps);
        print_json(&answer);
    } else {
        let mut table = Table::new(&["phase", "where", "what", "undone by"]);
        for step in &plan.steps {
            let undo = step
                .undo
                .clone()
                .unwrap_or_else(|| "- (past the point of no return)".to_owned());
            table.row([
                step.phase.to_string(),
                step.host.clone(),
                step.change.clone(),
                undo,
            ]);
        }
        print!("{table}");
        println!();
        verdict::print(&plan.preflight, &request.to);
    }
    Ok(if plan.preflight.passes() {
        ExitCode::SUCCESS
    } else {
        exit::refused()
    })
}

async fn ps(config: &Config, json: bool) -> Result<ExitCode, Error> {
    let containers = livemig::overview::containers(config).await?;
    if json {
        return Ok(print_json(&containers));
    }
    let mut table = Table::new(&[
        "id",
        "name",
        "state",
        "addresses",
        "flows",
        "through hops",
        "image",
    ]);
    for container in containers {
        let addresses: Vec<String> = container
            .addresses
            .iter()
            .map(ToString::to_string)
            .collect();
        table.row([
            container.id.short().to_owned(),
            container.name,
            container.state,
            addresses.join(","),
            container.flows.to_string(),
            container.through_hops.to_string(),
            container.image_name,
        ]);
    }
    print!("{table}");
    Ok(ExitCode::SUCCESS)
}

async fn stop_forwarding(
    config: &Config,
    container: Option<&str>,
    json: bool,
) -> Result<ExitCode, Error> {
    let (stopped, untold) = migration::stop_forwarding(config, container).await?;
    for error in untold {
        eprintln!("livemig: the next host does not know yet: {}", error.full());
    }
    if json {
        return Ok(print_json(&stopped));
    }
    for name in &stopped {
        println!("no more new connections are carried to `{name}`");
    }
    if stopped.is_empty() {
        println!("no new connections are carried to another host");
    }
    Ok(ExitCode::SUCCESS)
}

async fn flows(
    config: &Config,
    container: Option<&str>,
    watch: Option<Duration>,
    json: bool,
) -> Result<ExitCode, Error> {
    let Some(every) = watch else {
        let flows = livemig::overview::flows(config, container).await?;
        if json {
            return Ok(print_json(&flows));
        }
        print!("{}", flows_table(&flows));
        for forwarding in migration::forwardings(config)? {
            if let Some(to) = &forwarding.to {
                println!(
                    "new connections to `{}` go on through hop {}",
                    forwarding.name, to.hop
                );
            }
        }
        return Ok(ExitCode::SUCCESS);
    };
    /// Clears a terminal and goes to its upper left corner (ECMA-48: ED, CUP).
    const CLEAR: &str = "\x1b[2J\x1b[H";
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stdout());
    let mut tick = tokio::time::interval(every);
    let mut stop = std::pin::pin!(asked_to_stop());
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = &mut stop => return Ok(ExitCode::SUCCESS),
        }
        let flows = livemig::overview::flows(config, container).await?;
        let text = if json {
            serde_json::to_string(&flows).map(|line| line + "\n")
        } else {
            let clear = if terminal { CLEAR } else { "" };
            Ok(format!("{clear}{}", flows_table(&flows)))
        };
        // Whoever watched has gone.
        let written =
            text.map(|text| std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes()));
        if !matches!(written, Ok(Ok(()))) {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

fn flows_table(flows: &[livemig::overview::ListedFlow]) -> Table {
    let mut table = Table::new(&[
        "container",
        "protocol",
        "opened",
        "connection",
        "in",
        "out",
        "to it through",
        "from it through",
    ]);
    for listed in flows {
        let flow = &listed.flow;
        let hop = |direction: Direction| match flow.entry.mark.hop(direction) {
            Some(hop) => listed
                .hops
                .get(&hop)
                .cloned()
                .unwrap_or_else(|| format!("hop {hop}")),
            None => "-".to_owned(),
        };
        let towards = flow.towards_container();
        let (original, reply) = flow.entry.counters.unwrap_or_default();
        let (inwards, outwards) = match towards {
            Direction::Original => (original, reply),
            Direction::Reply => (reply, original),
        };
        table.row([
            listed
                .container
                .clone()
                .unwrap_or_else(|| flow.container.to_string()),
            flow.seen.protocol.name().to_owned(),
            format!("{:?}", flow.opening).to_lowercase(),
            flow.seen.to_string(),
            Bytes(inwards.bytes).to_string(),
            Bytes(outwards.bytes).to_string(),
            hop(towards),
            hop(towards.opposite()),
        ]);
    }
    table
}

async fn recover(config: &Config, keep: Option<Keep>, json: bool) -> Result<ExitCode, Error> {
    let mut tell = |event: Event| {
        if !json {
            Progress::new(false).observe(event);
        }
    };
    let recovered = migration::recover(config, keep, &mut tell).await?;
    let clean = recovered
        .iter()
        .all(|migration| migration.leftovers.is_empty());
    if json {
        print_json(&recovered);
    } else if recovered.is_empty() {
        println!("nothing was interrupted on this host");
    }
    if !json {
        for migration in &recovered {
            let done = if migration.finished {
                "finished"
            } else {
                "undone: its container runs here"
            };
            println!("migration {} was {done}", migration.migration);
            for leftover in &migration.leftovers {
                println!("still there: {leftover}");
            }
        }
    }
    Ok(if clean {
        ExitCode::SUCCESS
    } else {
        exit::leftovers()
    })
}
