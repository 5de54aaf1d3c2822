"""Common English words that fill the rest of the demo's vocabulary, so that ordinary text stays short.

They only reach the tokenizer after everything the tasks need.
"""

_TEXT = """
able about above accept accident account across act action active actual add address admit adult advance
advice affect afford after again against age agency agree ahead aim air alive allow almost alone along
already also although always among amount ancient angle angry announce annual another answer anxious anybody
anyone anything anyway apart apparent appeal appear apply approach area argue argument arm army around
arrange arrive article ask assume attack attempt attend attention attitude attract audience author authority
autumn available average avoid award aware away awful baby back bad bag balance ball band bank bar base
basic basis basket bath battle beat beautiful became because become bedroom before begin behave behind being
belief believe belong below benefit best better between beyond big bike bill bird birth bit bite bitter
blame blind block blood blow board boat body bone border born borrow boss both bother bottle bottom bowl box
boy brain branch brave break breakfast breath breathe bridge brief bring broad broken brother brown brush
budget build building burn bus business busy butter button buy cake camera camp cancel candle capable
captain card care career careful carry case cash castle catch cause celebrate central century certain chain
chair challenge chance change channel chapter character charge cheap check cheese chest chief child children
choice choose church circle citizen claim class clean clear climb clock close cloth clothes coach coal coast
coffee collect college colour combine come comfort command comment common community company compare compete
complain complete complex concern condition conduct confirm connect consider consist constant contact
contain content contest context continue contract control convert cool copy corner correct cost cotton could
council count couple courage course court cousin cover create credit crime crisis cross crowd culture cup
curious current curve custom customer cycle daily damage dance danger dare date daughter deal dear death
debate decade decide decision declare decline deep defend define degree delay deliver demand deny depend
depth describe desert deserve design desire desk despite destroy detail develop device difference different
difficult digital dinner direct direction dirty discover discuss disease dish distance divide doctor
document double doubt down dozen draft drama draw dream dress drink drop dry during dust duty each eager ear
early earn earth ease east easy economy edge edit education effect effort either elder elect element else
emotion employ empty enable encourage end enemy engage engine enjoy enough ensure enter entire environment
equal error escape especially establish estate even event ever every evidence exact examine example
excellent except exchange exercise exist expect expense expert explore express extend extra extreme face
fact factor factory fail fair faith fall false familiar family famous fancy far fashion fast father fault
favour fear feature feel fellow female fence few field fight figure final finance finger finish fire firm
first fish fit fix flag flat flight float floor flow fly focus fold follow foot force foreign forget forgive
form formal former forward found frame free freedom frequent fresh front fruit fuel full fun function fund
funny future gain game garage gas gather general generation gentle gift girl give glad glass global goal
gold good govern government grand grant grass great green ground group grow growth guard guess guest guide
guilt habit hair half hall hand handle hang happen happy hard hardly harm hat hate have health hear heart
heat heavy height here hero hidden high history hit hold hole holiday hope horse hospital host hotel hour
house however human hundred hungry hunt hurry hurt husband ice idea identify ignore image imagine impact
important improve include income increase indeed independent indicate individual industry influence inform
initial injure inside insist instance instead insurance intend interest interior international interview
into introduce invest invite involve iron issue item itself jacket job join joint journey judge juice jump
just keep kick kill kind king kitchen knee knife knock know knowledge lack lady land language large last
late laugh launch law lay layer lazy lead leader leaf learn least leather leave lecture left leg legal lemon
less lesson letter level library lie life lift light like likely limit line link lip liquid list listen
little live load local lock long look loose lose loss lot loud low luck lunch machine magazine main maintain
major make male man manage manner many mark market marry mass master match material matter maybe mayor meal
mean measure meat medical meet member memory mental mention menu merely message metal method middle might
mile milk mind mine minor minute mirror miss mistake model modern moment month mood moral more morning most
mother motion motor mountain mouth move movement movie much murder muscle museum must mystery narrow nation
native natural nature near nearly neat necessary neck need negative neighbour neither nerve network never
new newspaper next nice night nobody noise none normal north nose note nothing notice notion novel number
object observe obtain obvious occasion occur odd off offer office officer official often oil once only onto
open operate opinion opportunity oppose option orange order ordinary organ origin other ought our out
outside oven over owe own owner pace pack package page pain paint pair palace pale panel paper parent park
part particular partner party pass passage past path patient pattern pause pay peace pen pencil people
pepper perfect perform perhaps period permit person phase photo phrase physical piano pick picture piece
pile pink pipe place plain plan plane plant plastic plate platform play pleasant please pleasure plenty
pocket point police policy pool poor popular population position positive possible potato potential pound
power practice praise prefer prepare present press pretty prevent previous price pride priest primary prince
print prior prison private prize probably problem process produce product profession profit progress project
promise proof proper property propose protect proud prove provide public pull pump punish pupil pure purple
purpose push quality quantity quarter queen question quick quiet quite race radio rain raise range rapid
rare rate rather raw reach react read ready real reality realise reason receive recent recipe recognise
recommend record recover red reduce refer reflect refuse regard region regret regular relate relation relax
release relief religion rely remain remark remember remind remove rent repair repeat replace reply report
represent request require rescue research reserve resist resource respect respond rest restaurant result
retire return reveal review rice rich ride right rise risk river road rock role roll roof room root rope
rough round route routine row royal rule run rural rush sad safe sail salary sale salt same sample sand
satisfy save scale scene schedule scheme school science score screen sea search season seat second secret
section sector secure see seed seek seem select sell send sense sentence separate series serious serve
service session set settle seven several shade shake shall shame shape share sharp sheet shelf shell shift
shine ship shirt shock shoe shoot shop shore short should shoulder shout show shut sick side sight sign
signal silent silk silver similar simple since sing single sink sister site situation six size skill skin
sleep slice slide slight slip slow small smart smell smile smoke smooth snow social society soft soil solid
solution some someone somewhere son song soon sort soul sound soup source south space spare speak special
speech speed spell spend spirit split sport spot spread spring square stable staff stage stair stand
standard star start state station status stay steady steal steel step stick still stock stomach stop store
storm straight strange stream street strength stress stretch strict strike string strong structure struggle
student study stuff stupid style subject succeed success such sudden suffer sugar suggest suit summer supply
support suppose sure surface surprise surround survey survive suspect sweet swim switch symbol sympathy
system table tail talent talk tall tank target task taste tax teach team tear technology telephone
television temperature tend term test than thank that theatre their them theme then theory there therefore
these thick thin thing think third those though thought thousand threat three throat through throw thus
ticket tie tight till timber tired title together tomorrow tone tongue tonight tool tooth top topic total
touch tough tour toward town track trade tradition traffic train transfer transport trap travel treasure
treat tree trend trial trick trip trouble truck true trust truth try tube turn twice twin type ugly uncle
under understand union unique unit universe university unless until upon upper upset urban urge use useful
usual valley value variety various vast vegetable vehicle version very victory video view village violent
visit vital voice volume vote wage wait wake walk wall want war warm warn wash waste watch water wave weak
wealth weapon wear weather wedding week weigh weight welcome well west wet wheel whenever where whether
which while white whole whom whose wide wife wild will win wind window wine wing winter wise wish with
within without woman wonder wood word work world worry worth would wound wrap write wrong yard yellow
yesterday yet yield young yourself youth zero
"""
COMMON_WORDS = tuple(_TEXT.split())
