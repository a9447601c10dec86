-- wrk script: POST of $BODY with $AUTH, GET without a body; counts what was not a 2xx; prints one line of JSON.
local body, auth = os.getenv("BODY"), os.getenv("AUTH")
if body and body ~= "" then
  wrk.method, wrk.body = "POST", body
  wrk.headers["Content-Type"] = "application/x-www-form-urlencoded"
end
if auth and auth ~= "" then wrk.headers["Authorization"] = auth end
local pause = tonumber(os.getenv("PAUSE") or "0")
if pause > 0 then function delay() return pause end end
function done(summary, latency)
  io.write(string.format('JSON {"requests":%d,"us":%d,"bad":%d,"errors":%d,"p50":%d,"p99":%d}\n', summary.requests, summary.duration,
    summary.errors.status, summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout, latency:percentile(50), latency:percentile(99)))
end
