//! How ranks meet: all but rank 0 go to its address and say who they are.
//!
//! Rank 0 takes each rank of its run once, tells others why not, and answers when all are there. What it does not
//! understand it lets go: anybody may knock at a port. The listener is closed when all have come.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::error::DistError;
use crate::place::Place;
use crate::wire::{Answer, Hello, greet, greeting};

/// How long either side may take over a sentence.
const SENTENCE: Duration = Duration::from_secs(10);
/// Words of those who were not taken, at most.
const REMEMBERED: usize = 3;
const PROGRAM: &str = env!("CARGO_PKG_VERSION");

/// Another rank: its number, its host and the connection to it.
pub(crate) type Peer = (usize, String, TcpStream);

/// Meets the others. Returns the connections of this rank and the hosts of all.
pub(crate) fn meet(place: &Place, host: &str, patience: Duration) -> Result<(Vec<Peer>, Vec<String>), DistError> {
    match place.rank {
        _ if place.is_alone() => Ok((Vec::new(), vec![host.into()])),
        0 => receive(place, host, patience),
        _ => join(place, host, patience),
    }
}

/// The name of this host.
pub(crate) fn host_name() -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = kernel.or_else(|| std::env::var("HOSTNAME").ok()).or_else(|| std::env::var("COMPUTERNAME").ok());
    let name: String = name.unwrap_or_default().trim().chars().filter(|c| !c.is_control()).take(200).collect();
    if name.is_empty() { "a host without a name".into() } else { name }
}

/// Listens where the others will look: on loopback alone where they are told loopback.
fn listen(place: &Place) -> io::Result<TcpListener> {
    let addr = place.master_addr.trim();
    let loopback = match addr.parse::<IpAddr>() {
        Ok(ip) => ip.is_loopback().then_some(ip),
        Err(_) => (addr == "localhost").then_some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
    };
    let port = place.master_port;
    match loopback {
        Some(ip) => TcpListener::bind((ip, port)),
        // Both families where the system has both.
        None => match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)) {
            Err(error) if error.kind() != ErrorKind::AddrInUse => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
            bound => bound,
        },
    }
}

fn receive(place: &Place, host: &str, patience: Duration) -> Result<(Vec<Peer>, Vec<String>), DistError> {
    let port = place.master_port;
    let failed = |source| DistError::Listen { port, source };
    let listener = listen(place).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let deadline = Instant::now() + patience;
    let mut peers: Vec<Option<(String, TcpStream)>> = (1..place.world_size).map(|_| None).collect();
    let mut refused = Vec::new();
    let (sender, knocking) = channel();
    while peers.iter().any(Option::is_none) {
        if let Ok((stream, from)) = listener.accept() {
            listen_to(stream, from, sender.clone());
            continue;
        }
        take(place, &knocking, &mut peers, &mut refused);
        if Instant::now() > deadline {
            return Err(absent(place, patience, &mut peers, &refused));
        }
        sleep(Duration::from_millis(5));
    }
    let others = peers.into_iter().flatten();
    let peers: Vec<Peer> = others.enumerate().map(|(index, (host, stream))| (index + 1, host, stream)).collect();
    let hosts: Vec<String> = std::iter::once(host.to_string()).chain(peers.iter().map(|peer| peer.1.clone())).collect();
    for (rank, host, stream) in &peers {
        let lost = |error: io::Error| {
            let cause = format!("it was gone when all had come ({error})");
            DistError::Rank { rank: *rank, host: host.clone(), cause }
        };
        greet(stream, &Answer::Welcome(hosts.clone())).map_err(lost)?;
    }
    Ok((peers, hosts))
}

/// Hears on a thread of its own what somebody says who has knocked, so that who says nothing keeps nobody waiting.
fn listen_to(stream: TcpStream, from: SocketAddr, heard: Sender<(SocketAddr, TcpStream, io::Result<Hello>)>) {
    let hear = move || {
        let set = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_read_timeout(Some(SENTENCE)))
            .and_then(|()| stream.set_write_timeout(Some(SENTENCE)));
        let hello = set.and_then(|()| greeting::<Hello>(&stream));
        // Nobody listens any more once all are there.
        let _ = heard.send((from, stream, hello));
    };
    // Without a thread the connection is dropped; who knocked tries again.
    let _ = std::thread::Builder::new().name("dist-hello".into()).spawn(hear);
}

/// Takes those who have said who they are, or tells them why not.
fn take(
    place: &Place,
    knocking: &Receiver<(SocketAddr, TcpStream, io::Result<Hello>)>,
    peers: &mut [Option<(String, TcpStream)>],
    refused: &mut Vec<String>,
) {
    for (from, stream, hello) in knocking.try_iter() {
        let hello = match hello {
            Ok(hello) => hello,
            Err(error) => {
                tracing::debug!(%from, %error, "a connection that is no rank's");
                refused.push(format!("from {from} came something that is no rank ({error})"));
                continue;
            }
        };
        let seat = hello.rank.checked_sub(1).and_then(|index| peers.get_mut(index));
        match (objection(place, &hello), seat) {
            (None, Some(seat @ None)) => {
                // One who is gone again leaves the place free.
                if greet(&stream, &Answer::Taken).is_ok() {
                    *seat = Some((hello.host, stream));
                }
            }
            (objection, seat) => {
                let there = seat.and_then(|seat| seat.as_ref()).map_or("here", |(host, _)| host);
                let twice = || {
                    format!(
                        "a rank {} is there already, on {there}: each process needs a number of its own",
                        hello.rank
                    )
                };
                let reason = objection.unwrap_or_else(twice);
                let _ = greet(&stream, &Answer::Refused(reason.clone()));
                refused.push(format!("rank {} on {} was refused ({reason})", hello.rank, hello.host));
            }
        }
    }
}

/// Why a rank does not belong here, if it does not.
fn objection(place: &Place, hello: &Hello) -> Option<String> {
    let named = |run: &str| if run.is_empty() { "a run without a name".into() } else { format!("run \"{run}\"") };
    if hello.run != place.run {
        let (here, there) = (named(&place.run), named(&hello.run));
        return Some(format!(
            "this is {here}, and it belongs to {there}: two runs share a port; give one of them another MASTER_PORT"
        ));
    }
    if hello.world_size != place.world_size {
        return Some(format!("this run has {} ranks, and it was told of {}", place.world_size, hello.world_size));
    }
    if hello.program != PROGRAM {
        return Some(format!("rank 0 is of version {PROGRAM}, and it is of version {}", hello.program));
    }
    None
}

/// Tells those who came that others did not.
fn absent(
    place: &Place,
    patience: Duration,
    peers: &mut [Option<(String, TcpStream)>],
    refused: &[String],
) -> DistError {
    const NAMED: usize = 8;
    let missing: Vec<String> =
        peers.iter().enumerate().filter(|(_, peer)| peer.is_none()).map(|(index, _)| (index + 1).to_string()).collect();
    let more = missing.len().saturating_sub(NAMED);
    let names = missing[..missing.len() - more].join(", ");
    let who = match (missing.len(), more) {
        (1, _) => format!("rank {names}"),
        (_, 0) => format!("ranks {names}"),
        _ => format!("ranks {names} and {more} others"),
    };
    let first: Vec<&str> = refused.iter().take(REMEMBERED).map(String::as_str).collect();
    let refused = if first.is_empty() { String::new() } else { format!("; {}", first.join("; ")) };
    let error = DistError::Absent { who, seconds: patience.as_secs(), port: place.master_port, refused };
    for (_, stream) in peers.iter_mut().flatten() {
        let _ = greet(&*stream, &Answer::Refused(error.to_string()));
    }
    error
}

/// Goes to rank 0, and again, until it is there.
fn join(place: &Place, host: &str, patience: Duration) -> Result<(Vec<Peer>, Vec<String>), DistError> {
    let (rank, address) = (place.rank, place.address());
    let deadline = Instant::now() + patience;
    let hello = Hello {
        rank,
        world_size: place.world_size,
        host: host.into(),
        run: place.run.clone(),
        program: PROGRAM.into(),
    };
    let stranger = |problem: String| DistError::Stranger { address: address.clone(), problem };
    let mut pause = Duration::from_millis(20);
    let mut last = String::from("no try was made");
    while Instant::now() < deadline {
        match knock(&address, &hello, deadline) {
            Ok((stream, Answer::Taken)) => return await_others(place, stream, patience),
            Ok((_, Answer::Refused(reason))) => return Err(DistError::Refused { address, rank, reason }),
            Ok((_, Answer::Welcome(_))) => return Err(stranger("it welcomes before it has taken".into())),
            Err(error) if error.kind() == ErrorKind::InvalidData => return Err(stranger(error.to_string())),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                last = "no answer".into();
            }
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => last = "it hung up".into(),
            Err(error) => last = error.to_string(),
        }
        sleep(pause.min(deadline.saturating_duration_since(Instant::now())));
        pause = (pause * 2).min(Duration::from_secs(1));
    }
    Err(DistError::Unreachable { rank, address, seconds: patience.as_secs(), last })
}

/// One try: connects, says who this is, and hears the answer.
fn knock(address: &str, hello: &Hello, deadline: Instant) -> io::Result<(TcpStream, Answer)> {
    let mut last = io::Error::other("the name has no address");
    for target in address.to_socket_addrs()? {
        let left = deadline.saturating_duration_since(Instant::now()).clamp(Duration::from_millis(10), SENTENCE);
        let stream = match TcpStream::connect_timeout(&target, left) {
            Ok(stream) => stream,
            Err(error) => {
                last = error;
                continue;
            }
        };
        // A port of this host that nobody has yet may be the one that the connection itself was given.
        if stream.local_addr()? == stream.peer_addr()? {
            last = ErrorKind::ConnectionRefused.into();
            continue;
        }
        stream.set_read_timeout(Some(left))?;
        stream.set_write_timeout(Some(left))?;
        greet(&stream, hello)?;
        let answer = greeting(&stream)?;
        return Ok((stream, answer));
    }
    Err(last)
}

/// Waits, taken in, for the others.
fn await_others(place: &Place, stream: TcpStream, patience: Duration) -> Result<(Vec<Peer>, Vec<String>), DistError> {
    let (rank, address) = (place.rank, place.address());
    let system = |source| DistError::System { rank, source };
    // Rank 0 gives up before.
    stream.set_read_timeout(Some(patience + SENTENCE)).map_err(system)?;
    let lost = |cause: String| DistError::Rank { rank: 0, host: place.master_addr.clone(), cause };
    match greeting(&stream) {
        Ok(Answer::Welcome(hosts)) if hosts.len() == place.world_size => {
            let first = hosts.first().cloned().unwrap_or_default();
            Ok((vec![(0, first, stream)], hosts))
        }
        Ok(Answer::Refused(reason)) => Err(DistError::Refused { address, rank, reason }),
        Ok(other) => Err(lost(format!("it answered with {other:?} when all had come"))),
        Err(error) => Err(lost(format!("it was gone before all had come ({error})"))),
    }
}
