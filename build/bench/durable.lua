-- wrk script of durable work, one connection a thread (-t50 -c50): each thread is one client that goes on from its own answers.
-- WORK=refresh: a chain of rotations from a line of TOKENS. WORK=code: a code at AUTHORIZE with COOKIE, then its exchange.
-- WORK=login: BODY again and again. PAUSE: milliseconds between an answer and the next request. Counts what was done and what was refused; prints one line of JSON.
local work, path, auth = os.getenv("WORK"), os.getenv("TOKEN_PATH"), os.getenv("AUTH")
local form = { ["Content-Type"] = "application/x-www-form-urlencoded", ["Authorization"] = auth }
local extra, body = os.getenv("EXTRA") or "", os.getenv("BODY") or ""
local authorize, cookie = os.getenv("AUTHORIZE") or "", { ["Cookie"] = os.getenv("COOKIE") or "" }
local threads, lines = {}, nil
done_here, bad_here, token, code = 0, 0, "", nil

function setup(thread)
  if work == "refresh" and not lines then
    lines = {}
    for line in io.lines(os.getenv("TOKENS")) do lines[#lines + 1] = line end
  end
  threads[#threads + 1] = thread
  if lines then thread:set("token", lines[#threads]) end
end

local pause = tonumber(os.getenv("PAUSE") or "0")
if pause > 0 then
  function delay() return pause end
end

function request()
  if work == "login" then return wrk.format("POST", path, form, body) end
  if work == "refresh" then return wrk.format("POST", path, form, "grant_type=refresh_token&refresh_token=" .. token .. extra) end
  if code then return wrk.format("POST", path, form, "grant_type=authorization_code&code=" .. code .. extra) end
  return wrk.format("GET", authorize, cookie)
end

function response(status, headers, content)
  if work == "code" and not code then
    code = (headers["Location"] or headers["location"] or ""):match("[?&]code=([^&]+)")
    if not code then bad_here = bad_here + 1 end
    return
  end
  local new = content:match('"refresh_token":"([^"]+)"')
  if status == 200 and new then
    token, done_here = new, done_here + 1
  else
    bad_here = bad_here + 1
  end
  code = nil
end

function done(summary, latency)
  local count, bad = 0, 0
  for _, thread in ipairs(threads) do count, bad = count + thread:get("done_here"), bad + thread:get("bad_here") end
  io.write(string.format('JSON {"requests":%d,"us":%d,"bad":%d,"p50":%d,"p99":%d}\n', count, summary.duration, bad,
    latency:percentile(50), latency:percentile(99)))
end
